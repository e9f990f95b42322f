//! `sluice-cni`: the CNI plugin that gives a pod a port of the switch.
//!
//! It makes no network device. The pod's virtual machine listens on a socket in a folder that the device plugin has
//! given to it, and the switch connects there; this plugin tells the switch to, and under which rules.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

mod attachment;
mod commands;
mod config;
mod device_info;
mod environment;
mod error;
mod ipam;
mod result;
mod switch;

use config::{Config, NEWEST, VERSIONS};
use environment::{Environment, variable};
use error::{CniError, Code};

fn main() -> ExitCode {
    // For people; runtimes call without arguments.
    if std::env::args().nth(1).is_some_and(|argument| argument == "--version") {
        println!("sluice-cni {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let mut version = NEWEST.to_owned();
    let (printed, code) = match run(&mut version) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(error) => (error.to_json(&version), ExitCode::FAILURE),
    };
    match writeln!(io::stdout(), "{printed}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Runs the command that the environment names. `version` becomes the caller's once it is known.
fn run(version: &mut String) -> Result<Option<Value>, CniError> {
    let command = variable("COMMAND").unwrap_or_default();
    let (needed, since): (&[&str], _) = match command.as_str() {
        "ADD" => (&["CONTAINERID", "NETNS", "IFNAME"], "0.3.0"),
        "DEL" => (&["CONTAINERID", "IFNAME"], "0.3.0"),
        "CHECK" => (&["CONTAINERID", "NETNS", "IFNAME"], "0.4.0"),
        "GC" => (&["PATH"], "1.1.0"),
        "STATUS" => (&[], "1.1.0"),
        "VERSION" => return Ok(Some(versions(&read_input()?))),
        "" => {
            let problem = "CNI_COMMAND is not set; this is a CNI plugin, to be run by a container runtime";
            return Err(CniError::new(Code::Environment, problem));
        }
        other => return Err(CniError::new(Code::Environment, format!("CNI_COMMAND {other:?} is unknown"))),
    };
    let environment = Environment::read(needed, &variable)?;
    let config = Config::parse(read_input()?)?;
    *version = config.version.to_owned();
    if !config.at_least(since) {
        let problem = format!("{command} needs cniVersion {since}, and the configuration has {}", config.version);
        return Err(CniError::new(Code::Version, problem));
    }
    match command.as_str() {
        "ADD" => commands::add(&config, &environment).map(Some),
        "DEL" => commands::del(&config, &environment).map(|()| None),
        "CHECK" => commands::check(&config, &environment).map(|()| None),
        "GC" => commands::gc(&config, &environment).map(|()| None),
        _ => commands::status(&config, &environment).map(|()| None),
    }
}

fn read_input() -> Result<Vec<u8>, CniError> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text).map_err(|error| CniError::io("cannot read the configuration", &error))?;
    Ok(text)
}

/// The answer to VERSION, which repeats the caller's version.
fn versions(input: &[u8]) -> Value {
    let input: Value = serde_json::from_slice(input).unwrap_or_default();
    json!({ "cniVersion": input["cniVersion"].as_str().unwrap_or(NEWEST), "supportedVersions": VERSIONS })
}
