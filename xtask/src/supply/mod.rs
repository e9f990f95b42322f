//! What Sluice is made of: the packages that cargo knows of, rules for them, and a list of them for others.

mod licence;
pub(crate) mod sbom;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::Command;

/// A package of `cargo metadata`.
struct Package<'m> {
    id: &'m str,
    name: &'m str,
    version: &'m str,
    /// Licence expression; empty if it has none.
    licence: &'m str,
    /// Where it comes from; `None` if it is ours.
    source: Option<&'m str>,
    repository: Option<&'m str>,
    has_build_script: bool,
}

/// All packages that a build for this target, its tests included, can use.
fn metadata() -> Result<Value> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &target]);
    let output = command.current_dir(root()).output().context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).context("cargo metadata gives no JSON")
}

fn root() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/..")
}

/// The values of a list; none if it is no list.
fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn packages(metadata: &Value) -> Vec<Package<'_>> {
    list(&metadata["packages"]).iter().filter_map(Package::of).collect()
}

impl<'m> Package<'m> {
    fn of(package: &'m Value) -> Option<Self> {
        let is_script = |target: &Value| list(&target["kind"]).iter().any(|kind| kind == "custom-build");
        Some(Self {
            id: package["id"].as_str()?,
            name: package["name"].as_str()?,
            version: package["version"].as_str()?,
            licence: package["license"].as_str().unwrap_or_default(),
            source: package["source"].as_str(),
            repository: package["repository"].as_str(),
            has_build_script: list(&package["targets"]).iter().any(is_script),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The strings of a list in `deny.toml`.
    fn listed(key: &str) -> Vec<String> {
        let text = std::fs::read_to_string(format!("{}/deny.toml", root())).unwrap();
        let list = text.split(&format!("\n{key} = [")).nth(1).unwrap_or_else(|| panic!("no {key}"));
        let words = list.split(']').next().unwrap().split('"').skip(1).step_by(2);
        words.map(str::to_owned).collect()
    }

    #[test]
    fn everything_is_licensed_to_us() {
        let (metadata, allowed) = (metadata().unwrap(), listed("allow"));
        let all = packages(&metadata);
        assert!(all.len() > 100, "{}", all.len());
        let refused: Vec<_> = all
            .iter()
            .filter(|package| !licence::permits(package.licence, &allowed))
            .map(|package| format!("{} {}: '{}'", package.name, package.version, package.licence))
            .collect();
        assert!(refused.is_empty(), "not among the licences of deny.toml: {refused:#?}");
    }

    #[test]
    fn everything_comes_from_the_registry() {
        let (metadata, allowed) = (metadata().unwrap(), listed("allow-registry"));
        let sources: Vec<_> = allowed.iter().map(|registry| format!("registry+{registry}")).collect();
        let all = packages(&metadata);
        let foreign: Vec<_> = all
            .iter()
            .filter(|package| package.source.is_some_and(|source| !sources.iter().any(|known| known == source)))
            .map(|package| format!("{} from {:?}", package.name, package.source))
            .collect();
        assert!(foreign.is_empty(), "{foreign:#?}");
    }

    #[test]
    fn every_build_script_was_read() {
        let (metadata, allowed) = (metadata().unwrap(), listed("allow-build-scripts"));
        let all = packages(&metadata);
        let unread: Vec<_> = all
            .iter()
            .filter(|package| package.has_build_script && !allowed.iter().any(|name| name == package.name))
            .map(|package| package.name)
            .collect();
        assert!(
            unread.is_empty(),
            "read their build.rs, then add them to allow-build-scripts in deny.toml: {unread:?}"
        );
    }
}
