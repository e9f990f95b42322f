//! Edits of an XML document as text: every byte that no edit names stays as it is.

use std::ops::Range;

use roxmltree::{Document, Node, ParsingOptions};

/// Largest document, in bytes. KubeVirt's are some ten KiB; a message of the hook protocol is 4 MiB at most.
pub const MAX_SIZE: usize = 1 << 20;
/// Most nodes of a document: elements, text, comments. It bounds the memory that a document takes.
pub const MAX_NODES: u32 = 30_000;
/// Most attributes of one element. The parser compares each with all others.
pub const MAX_ATTRIBUTES: usize = 512;
/// Deepest nesting of elements. libvirt's own documents stay under ten.
pub const MAX_DEPTH: usize = 64;

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// More bytes than [`MAX_SIZE`].
    #[error("the document has {0} bytes, more than the {MAX_SIZE} allowed")]
    TooLarge(usize),
    /// More nodes than [`MAX_NODES`].
    #[error("the document has more than the {MAX_NODES} nodes allowed")]
    TooMany,
    /// More attributes of one element than [`MAX_ATTRIBUTES`].
    #[error("an element of the document has more than the {MAX_ATTRIBUTES} attributes allowed")]
    TooManyAttributes,
    /// Deeper than [`MAX_DEPTH`].
    #[error("the document is nested deeper than the {MAX_DEPTH} levels allowed")]
    TooDeep,
    /// It declares a document type, which is how entities come in.
    #[error("the document has a DTD, which a domain never needs")]
    Dtd,
    /// Not well-formed.
    #[error("not well-formed XML: {0}")]
    Malformed(String),
}

/// Parses `text`, and lets `read` look at it. Byte ranges that it sees are those of `text`.
///
/// # Errors
/// [`XmlError`], for everything that is not well-formed or that is larger than a domain can be.
pub fn with_document<T>(text: &str, read: impl FnOnce(&Document<'_>) -> T) -> Result<T, XmlError> {
    if text.len() > MAX_SIZE {
        return Err(XmlError::TooLarge(text.len()));
    }
    // No '<' can be within a tag, and each attribute has a '='. Text has them too, but not that many.
    if text.split('<').any(|piece| piece.matches('=').count() > MAX_ATTRIBUTES) {
        return Err(XmlError::TooManyAttributes);
    }
    let readable = match parse(text) {
        Ok(document) => return Ok(read(&document)),
        Err(roxmltree::Error::UnknownNamespace(prefix, _)) if prefix == "qemu" => without_qemu_prefix(text),
        Err(error) => return Err(explain(error)),
    };
    let document = parse(&readable).map_err(explain)?;
    Ok(read(&document))
}

fn parse(text: &str) -> Result<Document<'_>, roxmltree::Error> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options)
}

/// KubeVirt can lose the declaration of this prefix when it re-parses a domain. The same text without the prefix, each
/// byte at the same place, is good enough to look at.
fn without_qemu_prefix(text: &str) -> String {
    text.replace("<qemu:", "<qemu_").replace("</qemu:", "</qemu_")
}

fn explain(error: roxmltree::Error) -> XmlError {
    match error {
        roxmltree::Error::NodesLimitReached => XmlError::TooMany,
        roxmltree::Error::DtdDetected => XmlError::Dtd,
        error => XmlError::Malformed(error.to_string()),
    }
}

/// Checks that no element is nested deeper than [`MAX_DEPTH`].
///
/// # Errors
/// [`XmlError::TooDeep`].
pub fn check_depth(document: &Document<'_>) -> Result<(), XmlError> {
    // The document itself is an ancestor of all, and each node one of its own.
    let depth = |node: Node<'_, '_>| node.ancestors().take(MAX_DEPTH + 2).count() - 1;
    match document.descendants().all(|node| !node.is_element() || depth(node) <= MAX_DEPTH) {
        true => Ok(()),
        false => Err(XmlError::TooDeep),
    }
}

/// Whether an element is libvirt's `name`: without a namespace, as all of its own elements are.
pub fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

/// The children that are libvirt's `name`.
pub fn children<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| is(*child, name))
}

/// The first child that is libvirt's `name`.
pub fn child<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// An element to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Element>,
}

impl Element {
    /// An element without attributes and children.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), attributes: Vec::new(), children: Vec::new() }
    }

    /// The same with an attribute more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.attributes.push((name.into(), value.to_string()));
        self
    }

    /// Adds a child after the others.
    pub fn push(&mut self, child: Element) {
        self.children.push(child);
    }

    /// What an element of a document says: its name, attributes and child elements, all without namespaces.
    pub fn copy_of(node: Node<'_, '_>) -> Self {
        let copied = |attribute: roxmltree::Attribute<'_, '_>| (attribute.name().into(), attribute.value().into());
        Self {
            name: node.tag_name().name().into(),
            attributes: node.attributes().filter(|a| a.namespace().is_none()).map(copied).collect(),
            children: node.children().filter(Node::is_element).map(Self::copy_of).collect(),
        }
    }

    /// The element as text, its inner lines laid out from `layout`.
    fn render(&self, layout: &Layout) -> String {
        let mut text = format!("<{}", self.name);
        for (name, value) in &self.attributes {
            text.push_str(&format!(" {name}='{}'", escape(value)));
        }
        if self.children.is_empty() {
            text.push_str("/>");
            return text;
        }
        text.push('>');
        let inner = layout.inner();
        for child in &self.children {
            text.push_str(&inner.line_break());
            text.push_str(&child.render(&inner));
        }
        text.push_str(&layout.line_break());
        text.push_str(&format!("</{}>", self.name));
        text
    }
}

fn escape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '\'' => text.push_str("&apos;"),
            '\t' | '\n' | '\r' => text.push_str(&format!("&#{};", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

/// How the document is laid out at some element: its indentation, or all in one line.
#[derive(Debug, Clone)]
struct Layout(Option<String>);

impl Layout {
    /// As `node` has it: what is before it on its line, if that is nothing but blanks.
    fn of(text: &str, node: Node<'_, '_>) -> Self {
        let before = &text[..node.range().start];
        let line = before.rfind('\n').map(|at| &before[at + 1..]);
        Self(line.filter(|line| line.chars().all(|c| c == ' ' || c == '\t')).map(String::from))
    }

    /// One level further in, with tabs where the document has tabs.
    fn inner(&self) -> Self {
        Self(self.0.as_ref().map(|indent| format!("{indent}{}", if indent.contains('\t') { "\t" } else { "  " })))
    }

    fn line_break(&self) -> String {
        self.0.as_ref().map_or(String::new(), |indent| format!("\n{indent}"))
    }
}

/// Edits of one document, to be applied together.
#[derive(Debug)]
pub struct Edits<'t> {
    text: &'t str,
    edits: Vec<(Range<usize>, String)>,
}

impl<'t> Edits<'t> {
    /// No edits of `text`.
    pub fn new(text: &'t str) -> Self {
        Self { text, edits: Vec::new() }
    }

    /// Puts `element` in the place of `node`.
    pub fn replace(&mut self, node: Node<'_, '_>, element: &Element) {
        self.edits.push((node.range(), element.render(&Layout::of(self.text, node))));
    }

    /// Removes `node` together with the blanks and the line break before it.
    pub fn remove(&mut self, node: Node<'_, '_>) {
        let start = self.text[..node.range().start].trim_end_matches([' ', '\t', '\r', '\n']).len();
        self.edits.push((start..node.range().end, String::new()));
    }

    /// Puts `element` after its sibling `node`.
    pub fn insert_after(&mut self, node: Node<'_, '_>, element: &Element) {
        let layout = Layout::of(self.text, node);
        let end = node.range().end;
        self.edits.push((end..end, layout.line_break() + &element.render(&layout)));
    }

    /// Puts `element` before its sibling `node`.
    pub fn insert_before(&mut self, node: Node<'_, '_>, element: &Element) {
        let layout = Layout::of(self.text, node);
        let start = node.range().start;
        self.edits.push((start..start, element.render(&layout) + &layout.line_break()));
    }

    /// Makes `elements` the last children of `parent`.
    pub fn append(&mut self, parent: Node<'_, '_>, elements: &[Element]) {
        if let Some(last) = parent.last_element_child() {
            elements.iter().for_each(|element| self.insert_after(last, element));
            return;
        }
        let outer = Layout::of(self.text, parent);
        let inner = outer.inner();
        let lines: String = elements.iter().map(|element| inner.line_break() + &element.render(&inner)).collect();
        let (range, source) = (parent.range(), &self.text[parent.range()]);
        match (source.strip_suffix("/>"), source.rfind("</")) {
            (Some(tag), _) => {
                let name = element_name(source);
                let text = format!(">{lines}{}</{name}>", outer.line_break());
                self.edits.push((range.start + tag.len()..range.end, text));
            }
            // The blanks before the end tag stay, and are its indentation if there is a line break among them.
            (None, Some(end)) => {
                let content = source[..end].trim_end_matches([' ', '\t', '\r', '\n']).len();
                let closing = if source[content..end].contains('\n') { String::new() } else { outer.line_break() };
                self.edits.push((range.start + content..range.start + content, lines));
                self.edits.push((range.start + end..range.start + end, closing));
            }
            (None, None) => {}
        }
    }

    /// Gives `node` an attribute that it does not have yet.
    pub fn add_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        let at = node.range().start + 1 + element_name(&self.text[node.range()]).len();
        self.edits.push((at..at, format!(" {name}='{}'", escape(value))));
    }

    /// The document with all edits made.
    pub fn apply(mut self) -> String {
        // Insertions before what is replaced there. Stable, so several at one place stay in the order they were made.
        self.edits.sort_by_key(|(range, _)| (range.start, range.end));
        let (mut result, mut done) = (String::with_capacity(self.text.len() + 1024), 0);
        for (range, text) in &self.edits {
            debug_assert!(done <= range.start, "edits never overlap");
            result.push_str(&self.text[done..range.start]);
            result.push_str(text);
            done = range.end;
        }
        result.push_str(&self.text[done..]);
        result
    }
}

/// The name in a start tag, prefix included.
fn element_name(source: &str) -> &str {
    let name = source.strip_prefix('<').unwrap_or(source);
    name.split(|c: char| c.is_whitespace() || c == '/' || c == '>').next().unwrap_or(name)
}
