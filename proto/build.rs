//! Generates Rust from the `.proto` files, in pure Rust (no `protoc` needed).

use std::error::Error;

/// Where the contracts are, relative to this package.
const INCLUDE: &str = "proto";
/// The contracts.
const FILES: &[&str] = &[
    "proto/sluice/v1/control.proto",
    "proto/kubelet/deviceplugin/v1beta1/api.proto",
    "proto/kubelet/podresources/v1/api.proto",
    "proto/kubevirt/hooks/info.proto",
    "proto/kubevirt/hooks/v1alpha1.proto",
    "proto/kubevirt/hooks/v1alpha2.proto",
    "proto/kubevirt/hooks/v1alpha3.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDE}");
    let descriptors = protox::compile(FILES, [INCLUDE])?;
    tonic_prost_build::configure()
        // Ordered maps, so that output is the same every time.
        .btree_map(".")
        // What `--json` prints: the names of the contract, with states as words and VLAN sets as plain arrays.
        .message_attribute(".sluice.v1", "#[derive(serde::Serialize)]")
        .enum_attribute(".sluice.v1.PortConfig.target", "#[derive(serde::Serialize)]")
        .message_attribute(".sluice.v1.VlanSet", "#[serde(transparent)]")
        .field_attribute(".sluice.v1.PortStatus.state", STATE_AS_WORD)
        .field_attribute(".sluice.v1.PortStats.state", STATE_AS_WORD)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;
    Ok(())
}

const STATE_AS_WORD: &str = "#[serde(serialize_with = \"crate::sluice::v1::state_as_word\")]";
