//! gRPC contracts of Sluice, and what it takes to be their client, and to serve them to
//! foreign ones. The `.proto` files in `proto/` are the
//! reference of the contracts; the code is generated from them.

pub mod authority;
pub mod channel;
pub mod gone;

/// Our own contracts.
// Generated code is documented in the `.proto` files and follows its generator's style.
#[allow(missing_docs, unreachable_pub, clippy::all)]
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

/// The kubelet's device plugin contract: how a plugin offers devices.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod kubelet {
    /// Version v1beta1, the only one there is.
    pub mod v1beta1 {
        tonic::include_proto!("v1beta1");

        /// The version a plugin registers with.
        pub const VERSION: &str = "v1beta1";
        /// Health of a device that can be given out.
        pub const HEALTHY: &str = "Healthy";
        /// Health of a device that cannot.
        pub const UNHEALTHY: &str = "Unhealthy";
    }
}

/// The kubelet's pod-resources contract: which pod has which devices.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod podresources {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("v1");
    }
}

/// KubeVirt's hook sidecar contracts.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod kubevirt {
    /// What a sidecar can do.
    pub mod info {
        tonic::include_proto!("kubevirt.hooks.info");
    }
    /// The domain only.
    pub mod v1alpha1 {
        tonic::include_proto!("kubevirt.hooks.v1alpha1");
    }
    /// Domain and cloud-init.
    pub mod v1alpha2 {
        tonic::include_proto!("kubevirt.hooks.v1alpha2");
    }
    /// Domain, cloud-init and shutdown.
    pub mod v1alpha3 {
        tonic::include_proto!("kubevirt.hooks.v1alpha3");
    }
}
