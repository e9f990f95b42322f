//! gRPC contracts of Sluice. The `.proto` files in `proto/` are the reference; this is what is generated from them.

// Generated code is documented in the `.proto` files and follows its generator's style.
#![allow(missing_docs, unreachable_pub, clippy::all)]

/// Our own contracts.
pub mod sluice {
    /// Version 1: the control service of the switch.
    pub mod v1 {
        use serde::Serializer;

        tonic::include_proto!("sluice.v1");

        impl PortState {
            /// The state as one lower-case word, as `--json` and metrics show it.
            pub fn word(self) -> &'static str {
                match self {
                    Self::Unspecified => "unknown",
                    Self::Connecting => "connecting",
                    Self::Down => "down",
                    Self::Up => "up",
                    Self::Failed => "failed",
                }
            }
        }

        /// Serialises the number of a [`PortState`] as its word.
        pub(crate) fn state_as_word<S: Serializer>(state: &i32, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str(PortState::try_from(*state).unwrap_or_default().word())
        }
    }
}
