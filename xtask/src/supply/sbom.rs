//! The bill of materials: every package that is compiled into the programs, in CycloneDX's JSON.

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::{Package, list, metadata, packages, root, violations};

/// Packages whose programs are shipped.
const SHIPPED: [&str; 5] = ["sluice", "sluice-device-plugin", "sluice-cni", "sluice-binding-sidecar", "sluice-webhook"];

#[derive(Args)]
pub(crate) struct Options {
    /// File to write; standard output unless given.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes it, unless something in it breaks the rules. The same sources give the same bytes.
pub(crate) fn run(options: &Options) -> Result<()> {
    let metadata = metadata()?;
    let found = violations(&metadata)?;
    ensure!(found.is_empty(), "{}; see deny.toml", found.join("; "));
    let lock = std::fs::read_to_string(format!("{}/Cargo.lock", root())).context("cannot read Cargo.lock")?;
    let text = format!("{:#}\n", describe(&metadata, &checksums(&lock)));
    match &options.output {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display())),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}

/// What the lock file says that packages' archives hash to, by name and version.
fn checksums(lock: &str) -> BTreeMap<(&str, &str), &str> {
    lock.split("[[package]]").filter_map(entry).collect()
}

fn entry(block: &str) -> Option<((&str, &str), &str)> {
    Some(((field(block, "name")?, field(block, "version")?), field(block, "checksum")?))
}

fn field<'l>(block: &'l str, key: &str) -> Option<&'l str> {
    block.split_once(&format!("\n{key} = \""))?.1.split('"').next()
}

fn describe(metadata: &Value, checksums: &BTreeMap<(&str, &str), &str>) -> Value {
    let all: BTreeMap<_, _> = packages(metadata).into_iter().map(|package| (package.id.to_owned(), package)).collect();
    let uses = dependencies(metadata);
    let (mut used, mut open) = (BTreeSet::new(), Vec::new());
    open.extend(all.values().filter(|package| SHIPPED.contains(&package.name)).map(|package| package.id));
    while let Some(id) = open.pop() {
        if used.insert(id) {
            open.extend(uses.get(id).into_iter().flatten().copied());
        }
    }
    let used: Vec<_> = used.into_iter().filter_map(|id| all.get(id)).collect();
    let version = used.iter().find(|package| package.name == "sluice").map_or("0", |package| package.version);
    let edges = |package: &Package<'_>| {
        let targets = uses.get(package.id).into_iter().flatten().filter_map(|id| all.get(*id));
        json!({ "ref": purl(package), "dependsOn": targets.map(purl).collect::<BTreeSet<_>>() })
    };
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "sluice",
                "name": "sluice",
                "version": version,
                "licenses": [{ "expression": "Apache-2.0" }],
            },
        },
        "components": used.iter().map(|package| component(package, checksums)).collect::<Vec<_>>(),
        "dependencies": used.iter().map(|package| edges(package)).collect::<Vec<_>>(),
    })
}

/// What each package needs when it runs: neither for its build nor for its tests.
fn dependencies(metadata: &Value) -> BTreeMap<&str, Vec<&str>> {
    list(&metadata["resolve"]["nodes"]).iter().filter_map(node).collect()
}

fn node(node: &Value) -> Option<(&str, Vec<&str>)> {
    let runs = |dependency: &&Value| list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
    let needs = list(&node["deps"]).iter().filter(runs).filter_map(|dependency| dependency["pkg"].as_str());
    Some((node["id"].as_str()?, needs.collect()))
}

fn component(package: &Package<'_>, checksums: &BTreeMap<(&str, &str), &str>) -> Value {
    let mut component = json!({
        "type": "library",
        "bom-ref": purl(package),
        "name": package.name,
        "version": package.version,
        "purl": purl(package),
        "licenses": [{ "expression": package.licence.replace(" / ", " OR ").replace('/', " OR ") }],
    });
    if let Some(checksum) = checksums.get(&(package.name, package.version)) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    if let Some(repository) = package.repository.filter(|_| package.source.is_some()) {
        component["externalReferences"] = json!([{ "type": "vcs", "url": repository }]);
    }
    component
}

fn purl(package: &Package<'_>) -> String {
    format!("pkg:cargo/{}@{}", package.name, package.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_shipped_and_nothing_else() {
        let lock = std::fs::read_to_string(format!("{}/Cargo.lock", root())).unwrap();
        let bom = describe(&metadata().unwrap(), &checksums(&lock));
        let components = bom["components"].as_array().unwrap();
        let find = |name: &str| components.iter().find(|component| component["name"] == name);
        for name in SHIPPED.into_iter().chain(["vhost", "tokio", "libc"]) {
            assert!(find(name).is_some(), "{name} is missing");
        }
        for name in ["proptest", "e2e", "xtask", "protox", "virtio-queue"] {
            assert!(find(name).is_none(), "{name} is not shipped");
        }
        let vhost = find("vhost").unwrap();
        assert_eq!(vhost["hashes"][0]["content"].as_str().unwrap().len(), 64);
        assert!(vhost["licenses"][0]["expression"].as_str().unwrap().contains("Apache-2.0"));
        // All that is referred to is there.
        let known: BTreeSet<_> = components.iter().map(|component| component["bom-ref"].as_str().unwrap()).collect();
        let edges = bom["dependencies"].as_array().unwrap();
        assert_eq!(edges.len(), known.len());
        for target in edges.iter().flat_map(|edge| edge["dependsOn"].as_array().unwrap()) {
            assert!(known.contains(target.as_str().unwrap()), "{target}");
        }
    }
}
