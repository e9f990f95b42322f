//! The commands of the specification, less VERSION.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::Value;
use sluice_proto::gone;
use sluice_proto::sluice::v1::{PortState, PortStatus};

use crate::attachment::{Attachment, OWNERS, Owner};
use crate::config::Config;
use crate::environment::Environment;
use crate::error::{CniError, Code};
use crate::ipam::Ipam;
use crate::switch::Switch;
use crate::{device_info, result};

/// The folder of the control socket, if nothing else is configured.
const FOLDER: &str = "/run/sluice";

/// Makes an attachment. Whatever fails, nothing of it is left.
pub(crate) fn add(config: &Config, environment: &Environment) -> Result<Value, CniError> {
    let settings = config.settings()?;
    settings.device_info_file.as_deref().map(device_info::check_place).transpose()?;
    let attachment = Attachment::new(config, &settings, environment)?;
    // Before anything is handed out: a switch that is down costs no address.
    let mut switch = Switch::connect(&config.control, true)?;
    remove_leftovers(&mut switch, &attachment, environment)?;

    let addresses = ipam(config, environment).map(|ipam| ipam.run("ADD")).transpose()?;
    let finish = || {
        let result = result::build(config, &settings, environment, &attachment, addresses)?;
        switch.add(attachment.port.clone())?;
        let file = settings.device_info_file.as_deref();
        if let Some(Err(error)) = file.map(|file| device_info::write_if_absent(file, &attachment.pod_socket)) {
            let _ = switch.remove(&attachment.port.name, &attachment.owner);
            return Err(error);
        }
        Ok(result)
    };
    finish().inspect_err(|_| {
        // The first failure is the one to tell.
        let _ = ipam(config, environment).map(|ipam| ipam.run("DEL"));
    })
}

/// The device's folder is this pod's alone now. A port that another pod has left behind in it, under another
/// interface's name, would connect to whatever this pod puts there, in the other pod's network.
fn remove_leftovers(switch: &mut Switch, attachment: &Attachment, environment: &Environment) -> Result<(), CniError> {
    let mut ports = switch.ports(OWNERS, &attachment.device_folder)?;
    // It may have its socket elsewhere.
    ports.extend(switch.port(&attachment.port.name)?.filter(|port| port.owner.is_some()));
    for port in leftovers(ports, environment)? {
        if port.name != attachment.port.name {
            switch.remove(&port.name, port.owner.as_deref().unwrap_or_default())?;
        }
    }
    Ok(())
}

/// What of these ports another sandbox has left behind. A device that the kubelet has just given to this pod has no running
/// guest, but for the pod's own while its sandbox is replaced. If it has, the id was written into the configuration.
fn leftovers(mut ports: Vec<PortStatus>, environment: &Environment) -> Result<Vec<PortStatus>, CniError> {
    let owner_is = |port: &PortStatus, wanted: &dyn Fn(Owner<'_>) -> bool| {
        port.owner.as_deref().and_then(Owner::parse).is_some_and(wanted)
    };
    ports.retain(|port| !owner_is(port, &|owner| owner.container_id == environment.container_id));
    let of_this_pod = |owner: Owner<'_>| !owner.uid.is_empty() && owner.uid == environment.pod_uid();
    match ports.iter().find(|port| port.state() == PortState::Up && !owner_is(port, &of_this_pod)) {
        Some(PortStatus { name, owner, .. }) => {
            let owner = owner.as_deref().unwrap_or_default();
            let problem = format!("port {name} of {owner} has a running guest; was its device given to this pod?");
            Err(CniError::new(Code::TryAgain, problem))
        }
        None => Ok(ports),
    }
}

/// Removes an attachment, whatever is left of it and whatever is wrong with its configuration.
///
/// A switch that is down is not an error, since the runtime would try again for ever and the pod would never go. It finds a
/// note when it is back: after a reboot of the node, pods of before are taken down before there is a switch. Without a note the
/// port stays, disconnected, until the next ADD with the same device removes it, or a GC, which Multus does not pass on.
pub(crate) fn del(config: &Config, environment: &Environment) -> Result<(), CniError> {
    let removed = remove_ports(config, environment);
    // Not without the address: leases do not come back by themselves.
    ipam(config, environment).map(|ipam| ipam.run("DEL")).transpose()?;
    if let Err(error) = removed {
        match leave_note(config, environment) {
            Ok(()) => eprintln!(
                "sluice-cni: DEL leaves a note for the switch, which removes the port when it is back: {error}"
            ),
            Err(no_note) => eprintln!(
                "sluice-cni: DEL leaves the port to the next pod that gets the device: {error}; no note can be \
                 left for the switch: {no_note}"
            ),
        }
    }
    Ok(())
}

/// Notes beside the control socket that the attachment is gone.
fn leave_note(config: &Config, environment: &Environment) -> io::Result<()> {
    let note = gone::note(&config.control, &Owner::prefix(environment));
    let note = note.ok_or_else(|| io::Error::other("its name would be none for a file"))?;
    if note.parent() == Some(Path::new(FOLDER)) {
        // After a boot it is not there. Others are left to whoever has named them: root makes none where a tenant likes.
        match fs::create_dir(FOLDER) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    // Whoever else can write there could have led it elsewhere.
    match File::options().write(true).create_new(true).open(&note) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && fs::symlink_metadata(&note)?.is_file() => Ok(()),
        outcome => outcome.map(drop),
    }
}

fn remove_ports(config: &Config, environment: &Environment) -> Result<(), CniError> {
    let mut switch = Switch::connect(&config.control, true)?;
    for port in switch.ports(&Owner::prefix(environment), "")? {
        switch.remove(&port.name, port.owner.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

/// Checks that an attachment is as ADD has left it.
pub(crate) fn check(config: &Config, environment: &Environment) -> Result<(), CniError> {
    let settings = config.settings()?;
    let attachment = Attachment::new(config, &settings, environment)?;
    let previous = config.prev_result()?.ok_or_else(|| CniError::config("CHECK needs \"prevResult\""))?;
    result::check(&previous, environment, &attachment)?;
    let mut switch = Switch::connect(&config.control, true)?;
    let ports = switch.ports(&Owner::prefix(environment), "")?;
    let name = &attachment.port.name;
    let Some(port) = ports.iter().find(|port| port.name == *name) else {
        return Err(CniError::new(Code::Switch, format!("the switch has no port {name} of this pod")));
    };
    let differences = attachment.differences(port);
    if !differences.is_empty() {
        let problem = format!("port {name} is not as configured in: {}", differences.join(", "));
        return Err(CniError::new(Code::Switch, problem));
    }
    ipam(config, environment).map(|ipam| ipam.run("CHECK")).transpose()?;
    Ok(())
}

/// Removes the ports of this network's attachments that the runtime does not know any more.
pub(crate) fn gc(config: &Config, environment: &Environment) -> Result<(), CniError> {
    config.check_name()?;
    let valid = config.valid_attachments()?;
    let mut switch = Switch::connect(&config.control, true)?;
    for port in switch.ports(OWNERS, "")? {
        let text = port.owner.as_deref().unwrap_or_default();
        let Some(owner) = Owner::parse(text).filter(|owner| owner.network == config.name) else { continue };
        let known = |(id, interface): &(String, String)| id == owner.container_id && interface == owner.interface;
        if !valid.iter().any(known) {
            switch.remove(&port.name, text)?;
        }
    }
    ipam(config, environment).map(|ipam| ipam.run("GC")).transpose()?;
    Ok(())
}

/// Tells whether ADD would work.
pub(crate) fn status(config: &Config, environment: &Environment) -> Result<(), CniError> {
    config.settings()?;
    // Asked often; a switch that is being restarted is not available.
    let answers = Switch::connect(&config.control, false).and_then(|mut switch| switch.ping());
    answers.map_err(|error| error.with_code(Code::Unavailable))?;
    ipam(config, environment).map(|ipam| ipam.run("STATUS")).transpose()?;
    Ok(())
}

fn ipam<'a>(config: &'a Config, environment: &'a Environment) -> Option<Ipam<'a>> {
    let plugin = config.ipam.as_deref()?;
    Some(Ipam { plugin, config: &config.text, path: &environment.path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(args: &str) -> Environment {
        let read = |name: &str| match name {
            "CONTAINERID" => Some("c1".to_owned()),
            "ARGS" => Some(args.into()),
            _ => None,
        };
        Environment::read(&[], &read).unwrap()
    }

    fn port(owner: &str, state: PortState) -> PortStatus {
        PortStatus { name: "p".into(), owner: Some(owner.into()), state: state.into(), ..Default::default() }
    }

    #[test]
    fn a_running_guest_is_no_leftover() {
        let environment = environment("K8S_POD_UID=u1");
        let kept = |owner: &str, state| leftovers(vec![port(owner, state)], &environment).map(|ports| ports.is_empty());
        // The same call again.
        assert_eq!(kept("cni/c1/net1/u1/blue", PortState::Up), Ok(true));
        // This pod's sandbox was replaced.
        assert_eq!(kept("cni/c0/net1/u1/blue", PortState::Up), Ok(false));
        for state in [PortState::Connecting, PortState::Down, PortState::Failed] {
            assert_eq!(kept("cni/c0/net1/u0/blue", state), Ok(false), "{state:?}");
        }
        for owner in ["cni/c0/net1/u0/blue", "cni/c0/net1//blue", "me"] {
            let error = kept(owner, PortState::Up).unwrap_err();
            assert_eq!(error.to_json("")["code"], 11, "{owner}: {error}");
        }
    }

    #[test]
    fn without_a_uid_no_two_pods_are_one() {
        let ports = vec![port("cni/c0/net1//blue", PortState::Up)];
        assert!(leftovers(ports, &environment("")).is_err());
    }

    #[test]
    fn a_note_makes_no_folder_that_a_network_names() {
        // Below /run, where folders were made; elsewhere without the right to write there.
        let dir = tempfile::tempdir_in("/run").or_else(|_| tempfile::tempdir()).unwrap();
        let folder = dir.path().join("x");
        let text = format!(r#"{{"cniVersion":"1.0.0","name":"blue","control":"{}/c.sock"}}"#, folder.display());
        let config = Config::parse(text.into()).unwrap();
        assert_eq!(leave_note(&config, &environment("")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!folder.exists());
        fs::create_dir(&folder).unwrap();
        leave_note(&config, &environment("")).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }
}
