//! What whoever owns ports leaves for a switch that does not run: a note beside its control socket that ports are to go, found
//! when it starts again. The name of the file says all, so that reading it needs no right to read files there.

use std::path::{Path, PathBuf};

/// Stands between the name of the control socket and the owner.
const MARK: &str = ".gone.";
/// Stands for the slashes of an owner, which file names cannot have.
const SLASH: char = ':';

/// The note that the ports are to go whose owners begin with `owner`, which ends with a slash. `None` if that has a colon, or
/// is too long for a file name.
pub fn note(control: &Path, owner: &str) -> Option<PathBuf> {
    let name = format!("{}{MARK}{}", control.file_name()?.to_str()?, owner.replace('/', &SLASH.to_string()));
    let fits = owner.ends_with('/') && owner.len() > 1 && !owner.contains(SLASH) && name.len() <= 255;
    fits.then(|| control.with_file_name(name))
}

/// What the owners of the ports begin with that a file is a note about, by its name; `None` if it is no note for the switch
/// with that control socket.
pub fn owner_of(control: &Path, file_name: &str) -> Option<String> {
    let owner = file_name.strip_prefix(control.file_name()?.to_str()?)?.strip_prefix(MARK)?;
    // Less would be of too many.
    (owner.len() > 1 && owner.ends_with(SLASH) && !owner.contains('/')).then(|| owner.replace(SLASH, "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let control = Path::new("/run/sluice/control.sock");
        let path = note(control, "cni/0123/pod.1/").unwrap();
        assert_eq!(path, Path::new("/run/sluice/control.sock.gone.cni:0123:pod.1:"));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(owner_of(control, name).as_deref(), Some("cni/0123/pod.1/"));
        assert_eq!(owner_of(Path::new("/run/sluice/other.sock"), name), None);
    }

    #[test]
    fn what_would_be_of_others_is_refused() {
        let control = Path::new("/run/c.sock");
        for owner in ["", "/", "cni", "cni/a:b/", &format!("cni/{}/", "x".repeat(250))] {
            assert_eq!(note(control, owner), None, "{owner}");
        }
        for name in ["c.sock", "c.sock.gone.", "c.sock.gone.:", "c.sock.gone.cni", "c.sock.lock", "gone.cni:"] {
            assert_eq!(owner_of(control, name), None, "{name}");
        }
    }
}
