//! The result of ADD: that of the plugin before us, if there is one, and our interface.

use serde_json::{Map, Value, json};

use crate::attachment::{Attachment, normal_mac};
use crate::config::{Config, Settings};
use crate::environment::Environment;
use crate::error::{CniError, Code};

/// MTU of a network that names none: what a guest takes for granted. The switch need not enforce it.
const DEFAULT_MTU: u32 = 1500;

/// Puts the result together. `addresses` is what the IPAM plugin gave.
pub(crate) fn build(
    config: &Config,
    settings: &Settings,
    environment: &Environment,
    attachment: &Attachment,
    addresses: Option<Map<String, Value>>,
) -> Result<Value, CniError> {
    let mut result = config.prev_result()?.unwrap_or_default();
    result.insert("cniVersion".into(), config.version.into());
    let mut interface = json!({
        "name": environment.interface,
        "mac": attachment.mac,
        "mtu": settings.mtu.unwrap_or(DEFAULT_MTU),
        // There is no network device, but who reads the result takes an interface without this for one of the host.
        "sandbox": environment.netns,
    });
    if config.at_least("1.1.0") {
        interface["socketPath"] = attachment.socket.as_str().into();
    }
    let interfaces = list(&mut result, "interfaces")?;
    interfaces.push(interface);
    let index = interfaces.len() - 1;

    let mut addresses = addresses.unwrap_or_else(|| static_addresses(config, settings));
    let mut ips = std::mem::take(list(&mut addresses, "ips")?);
    ips.iter_mut().for_each(|ip| ip["interface"] = index.into());
    for (key, mut more) in [("ips", ips), ("routes", std::mem::take(list(&mut addresses, "routes")?))] {
        if !more.is_empty() {
            list(&mut result, key)?.append(&mut more);
        }
    }
    if let Some(dns) = addresses.remove("dns") {
        result.entry("dns").or_insert(dns);
    }
    Ok(Value::Object(result))
}

/// Addresses that were asked for without an IPAM plugin to give them: they are passed on, for what reads the result.
fn static_addresses(config: &Config, settings: &Settings) -> Map<String, Value> {
    let describe = |address: &String| {
        let mut ip = json!({ "address": address });
        // Versions before 1.0.0 want the family.
        if !config.at_least("1.0.0") {
            ip["version"] = if address.contains(':') { "6" } else { "4" }.into();
        }
        ip
    };
    Map::from_iter([("ips".to_owned(), settings.ips.iter().map(describe).collect())])
}

/// A list in a result, made if it is not there.
fn list<'r>(result: &'r mut Map<String, Value>, key: &str) -> Result<&'r mut Vec<Value>, CniError> {
    let value = result.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    let bad = || CniError::new(Code::Decode, format!("{key:?} of a result is not a list"));
    value.as_array_mut().filter(|list| list.iter().all(Value::is_object)).ok_or_else(bad)
}

/// Checks that the result of ADD, which the runtime kept, has our interface.
pub(crate) fn check(
    previous: &Map<String, Value>,
    environment: &Environment,
    attachment: &Attachment,
) -> Result<(), CniError> {
    let text = |interface: &Value, key: &str| interface[key].as_str().unwrap_or_default().to_owned();
    let ours = |interface: &&Value| {
        text(interface, "name") == environment.interface && text(interface, "sandbox") == environment.netns
    };
    let interfaces = previous.get("interfaces").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let Some(interface) = interfaces.iter().rfind(ours) else {
        let problem = format!("\"prevResult\" has no interface {} of {}", environment.interface, environment.netns);
        return Err(CniError::config(problem));
    };
    let mac = text(interface, "mac");
    if normal_mac(&mac).as_deref() == Some(&attachment.mac) {
        return Ok(());
    }
    Err(CniError::config(format!("\"prevResult\" has address {mac:?}, and the port has {}", attachment.mac)))
}
