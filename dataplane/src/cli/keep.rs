//! `sluice keep`: the keeper.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};

use signal_hook::consts::{SIGINT, SIGTERM};
use sluice::keeper::{self, bind, serve};
use sluice::sandbox::{self, Needs, SandboxMode};

use super::Failure;
use super::args::KeepArgs;
use super::run::many_descriptors;

/// Keeps connections until the switch ends, or until a signal does.
pub(crate) fn run(args: &KeepArgs) -> Result<(), Failure> {
    many_descriptors();
    let state = std::path::absolute(&args.state).map_err(Failure::failed)?;
    let path = keeper::socket(&state);
    let listener = if args.inherited { inherited() } else { bind(&path) };
    let listener =
        listener.map_err(|error| Failure::Failed(format!("cannot listen on {}: {error}", path.display())))?;
    let stop = on_signal().map_err(Failure::failed)?;
    // It only moves descriptors that it cannot use: nothing is needed for that.
    let (kinds, control) = (Vec::new(), path.clone());
    let needs = Needs { mode: SandboxMode::Auto, kinds, state, control, socket_root: Some("/nonexistent".into()) };
    sandbox::apply(&needs).map_err(Failure::failed)?;
    let inode = || std::fs::symlink_metadata(&path).map(|meta| meta.ino()).ok();
    let ours = inode();
    let result = serve(&listener, stop.as_fd(), !args.inherited);
    // Another one may be there in our place by now, if a switch found that we do not answer.
    if inode() == ours {
        let _ = std::fs::remove_file(&path);
    }
    result.map_err(Failure::failed)
}

/// What becomes readable when we are to end. In a container we are process 1, which no signal ends by itself.
fn on_signal() -> std::io::Result<UnixStream> {
    let (stop, told) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, told.try_clone()?)?;
    }
    Ok(stop)
}

/// The listener that is our standard input.
fn inherited() -> std::io::Result<UnixListener> {
    rustix::thread::set_name(c"sl-keeper")?;
    Ok(std::io::stdin().as_fd().try_clone_to_owned()?.into())
}
