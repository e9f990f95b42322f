//! What goes wrong, in the terms of the CNI specification.

use serde_json::{Value, json};

/// Error codes: those of the specification, and one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// The version of the configuration is not one we know, or the command came later than that version.
    Version = 1,
    /// A key of the configuration that we do not know.
    UnsupportedField = 2,
    /// An environment variable is missing or wrong.
    Environment = 4,
    /// Something could not be read, written or executed.
    Io = 5,
    /// Something is not the JSON that it should be.
    Decode = 6,
    /// A value of the configuration is wrong.
    InvalidConfig = 7,
    /// It may work later.
    TryAgain = 11,
    /// The plugin cannot serve ADD at the moment.
    Unavailable = 50,
    /// The switch refused, or what it has is not what was added.
    Switch = 100,
}

/// A failure, to be printed as the specification wants it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CniError {
    /// A [`Code`], or what an IPAM plugin gave.
    code: u32,
    message: String,
}

impl CniError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code as u32, message: message.into() }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidConfig, message)
    }

    pub(crate) fn io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        Self::new(Code::Io, format!("{what}: {error}"))
    }

    /// What a plugin that we called printed, with its name in front.
    pub(crate) fn of_plugin(plugin: &str, printed: &Value) -> Option<Self> {
        let code = printed.get("code")?.as_u64()?.try_into().ok()?;
        let text = |key| printed.get(key).and_then(Value::as_str).unwrap_or_default();
        let message = format!("ipam plugin {plugin}: {} {}", text("msg"), text("details"));
        Some(Self { code, message: message.trim_end().into() })
    }

    /// The same failure with another code, for STATUS.
    pub(crate) fn with_code(self, code: Code) -> Self {
        Self { code: code as u32, ..self }
    }

    /// As printed. The version is the caller's, if that could be understood.
    pub(crate) fn to_json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": self.message })
    }
}
