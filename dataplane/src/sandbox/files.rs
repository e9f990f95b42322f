//! Of the file system and the network, what the switch needs (landlock(7)).
//!
//! Only what is opened or made from now on is restricted, and connecting to a socket is neither: where the sockets of
//! ports may be is for [`SocketPlace`](crate::port::vhost::SocketPlace) to see to.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::Needs;

/// Newest kernel interface of which everything is used that there is.
const NEWEST: ABI = ABI::V6;

/// Restricts this thread and all that it starts.
pub(super) fn restrict(needs: &Needs) -> io::Result<String> {
    let files = AccessFs::ReadFile | AccessFs::ReadDir;
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
    let state = files | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
    let mut rules = vec![
        // Who calls, and what interfaces there are.
        (Path::new("/proc"), files),
        (Path::new("/sys"), files),
        (&needs.state, state),
        (needs.socket_root.as_deref().unwrap_or(Path::new("/")), sockets),
    ];
    rules.extend(needs.control.parent().map(|folder| (folder, sockets)));
    if needs.kinds.iter().any(|kind| kind == "tap") {
        rules.push((Path::new("/dev/net/tun"), AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev));
    }
    let status = enforce(&rules).map_err(io::Error::other)?;
    match status {
        RulesetStatus::FullyEnforced => Ok(String::new()),
        RulesetStatus::PartiallyEnforced => Ok(" (in part)".to_owned()),
        RulesetStatus::NotEnforced => Err(io::Error::other("not in this kernel, or not switched on")),
    }
}

fn enforce(rules: &[(&Path, BitFlags<AccessFs>)]) -> Result<RulesetStatus, landlock::RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        // The one listener that there can be, for metrics, is open already.
        .handle_access(AccessNet::from_all(NEWEST))?
        // Nobody else's abstract sockets, and no signals to other processes.
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (path, access) in rules {
        // What is not there needs no rule.
        if let Ok(folder) = PathFd::new(path) {
            let is_folder = path.is_dir();
            let access = if is_folder { *access } else { *access & AccessFs::from_file(NEWEST) };
            ruleset = ruleset.add_rule(PathBeneath::new(folder, access))?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset)
}
