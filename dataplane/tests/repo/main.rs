//! Rules of the repository that no linter sees.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod metrics;

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Markdown files that are ours.
fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && !["target", "node_modules"].contains(&&*name) {
            documents(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Targets of `[text](target)` outside of code.
fn links(text: &str) -> Vec<String> {
    let mut code = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        for piece in line.split("](").skip(1) {
            found.extend(piece.split(')').next().map(str::to_owned));
        }
    }
    found
}

#[test]
fn links_in_documents_resolve() {
    let mut all = Vec::new();
    documents(&root(), &mut all);
    assert!(all.iter().any(|path| path.ends_with("README.md")), "{all:?}");
    let mut broken = Vec::new();
    for document in &all {
        for link in links(&std::fs::read_to_string(document).unwrap()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            if !document.parent().unwrap().join(file).exists() {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_dependency_says_why_it_is_here() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).and_then(|rest| rest.split("\n[").next()).unwrap();
    let silent: Vec<_> = section
        .lines()
        .filter(|line| line.contains('=') && !line.trim_start().starts_with('#'))
        .filter(|line| !line.contains('#') && !line.contains("path ="))
        .collect();
    assert!(silent.is_empty(), "{silent:#?}");
}

#[test]
fn what_the_switch_says_in_the_documents_is_what_it_says() {
    let table = std::fs::read_to_string(root().join("docs/kubevirt.md")).unwrap();
    let code = std::fs::read_to_string(root().join("dataplane/src/port/vhost/socket.rs")).unwrap();
    let quotes: Vec<_> =
        table.split('`').skip(1).step_by(2).filter(|quote| quote.starts_with("waiting for ")).collect();
    assert!(!quotes.is_empty());
    for quote in quotes {
        assert!(code.contains(&quote.replace('…', "{0}")), "{quote}");
    }
}
