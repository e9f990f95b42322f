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

/// What breaks the rules of `deny.toml`, one line for each; the same as `cargo deny check` would say, were it there.
fn violations(metadata: &Value) -> Result<Vec<String>> {
    let rules = std::fs::read_to_string(format!("{}/deny.toml", root())).context("cannot read deny.toml")?;
    let (licences, registries) = (listed(&rules, "allow")?, listed(&rules, "allow-registry")?);
    let scripts = listed(&rules, "allow-build-scripts")?;
    let comes_from = |source: &str| registries.iter().any(|registry| source == format!("registry+{registry}"));
    let mut found = Vec::new();
    for package in packages(metadata) {
        let Package { name, version, licence, source, .. } = package;
        if !licence::permits(licence, &licences) {
            found.push(format!("{name} {version} has licence '{licence}', which is not among those allowed"));
        }
        if let Some(source) = source.filter(|source| !comes_from(source)) {
            found.push(format!("{name} {version} comes from {source}"));
        }
        if package.has_build_script && !scripts.iter().any(|script| script == name) {
            found.push(format!("{name} {version} has a build script; read it, then add it to allow-build-scripts"));
        }
    }
    Ok(found)
}

/// The strings of a list in `deny.toml`.
fn listed(rules: &str, key: &str) -> Result<Vec<String>> {
    let list = rules.split(&format!("\n{key} = [")).nth(1).and_then(|rest| rest.split(']').next());
    let words = list.with_context(|| format!("deny.toml has no list {key}"))?.split('"').skip(1).step_by(2);
    Ok(words.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_we_are_made_of_is_allowed() {
        let metadata = metadata().unwrap();
        assert!(packages(&metadata).len() > 100);
        let found = violations(&metadata).unwrap();
        assert!(found.is_empty(), "see deny.toml: {found:#?}");
    }

    #[test]
    fn what_is_not_is_found() {
        let package = |licence: &str, source: &str, kind: &str| {
            serde_json::json!({ "packages": [{ "id": "x", "name": "x", "version": "1", "license": licence,
                "source": source, "targets": [{ "kind": [kind] }] }] })
        };
        let registry = "registry+https://github.com/rust-lang/crates.io-index";
        let found = |metadata| violations(&metadata).unwrap().join("\n");
        assert_eq!(found(package("MIT", registry, "lib")), "");
        assert!(found(package("GPL-3.0", registry, "lib")).contains("has licence 'GPL-3.0'"));
        assert!(found(package("MIT", "git+https://example.invalid/x", "lib")).contains("comes from git+"));
        assert!(found(package("MIT", registry, "custom-build")).contains("has a build script"));
    }
}
