//! Where control sockets lie, what they are called, and which of them are dead.
//!
//! Invariants: a folder in the temporary folder is used only when it is ours alone, since anybody
//! can make one of that name; sockets come and go under the folder's lock, so that a stale one is
//! never removed in the moment in which a new job takes its name.
//!
//! Called by both ends of the socket.

use super::system;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// End of a socket's file name.
const SUFFIX: &str = ".sock";

/// Longest name that a socket's file has in full.
const NAME_MAX: usize = 56;

/// Where the folder for services is.
const SERVICES: &str = "/run/testudo";

/// All folders that may have sockets of this user's jobs, the preferred ones first.
#[must_use]
pub fn candidates() -> Vec<PathBuf> {
    let of_session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| {
        // After a change of user the variable may still name another's.
        folder.is_absolute() && fs::metadata(folder).is_ok_and(|at| at.uid() == system::user())
    });
    let mut folders: Vec<_> = of_session.map(|folder| folder.join("testudo")).into_iter().collect();
    folders.push(PathBuf::from(SERVICES));
    folders.push(std::env::temp_dir().join(format!("testudo-{}", system::user())));
    folders
}

/// The folder for a new socket: the first candidate that there is or that can be made.
pub(super) fn usable() -> io::Result<PathBuf> {
    let mut refused = Vec::new();
    for folder in candidates() {
        let done = if folder == Path::new(SERVICES) {
            if system::is_writable(&folder) { Ok(()) } else { Err(ErrorKind::NotFound.into()) }
        } else {
            make(&folder)
        };
        match done {
            Ok(()) => return Ok(folder),
            Err(error) => refused.push(format!("{}: {error}", folder.display())),
        }
    }
    Err(io::Error::other(format!("no folder for the control socket ({})", refused.join("; "))))
}

/// Makes a folder for this user alone, or checks that it is one.
pub(super) fn make(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let at = fs::symlink_metadata(folder)?;
    let is_ours = at.is_dir() && at.uid() == system::user() && at.mode() & 0o022 == 0;
    if !is_ours {
        return Err(io::Error::other("it must be a folder that only this user can write to"));
    }
    if !system::is_writable(folder) {
        return Err(ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

/// A job's name as a file name: as it is, or shortened and with a checksum.
pub(super) fn file_name(job: &str) -> String {
    let is_plain = |c: char| !c.is_control() && c != '/';
    if job.len() <= NAME_MAX && job.chars().all(is_plain) {
        return format!("{job}{SUFFIX}");
    }
    let mut short: String = job.chars().filter(|c| is_plain(*c)).collect();
    let mut end = short.len().min(NAME_MAX - 17);
    while !short.is_char_boundary(end) {
        end -= 1;
    }
    short.truncate(end);
    // FNV-1a: the same in every build, unlike the standard library's.
    let sum = job.bytes().fold(0xCBF2_9CE4_8422_2325u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    format!("{short}~{sum:016x}{SUFFIX}")
}

/// The sockets in a folder, with the names that their files show, sorted.
pub(super) fn sockets(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut sockets: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_suffix(SUFFIX)?.to_owned(), entry.path()))
        })
        .collect();
    sockets.sort();
    sockets
}

/// A folder that is held open: paths through it are short, whatever its own is. The kernel takes
/// no more than 107 bytes of a socket's path.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    held: File,
}

impl Folder {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
        let held = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(Self { path: path.to_owned(), held })
    }

    /// The path of a file as people know it.
    pub(super) fn path_of(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    /// A short path to a file.
    pub(super) fn short(&self, file: &str) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/self/fd/{}/{file}", self.held.as_raw_fd()))
    }

    /// Keeps other jobs and tools from adding and removing sockets, until the lock is dropped.
    pub(super) fn lock(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(libc::O_NOFOLLOW).open(self.path.join(".lock"))?;
        system::lock(&file)?;
        Ok(file)
    }

    /// Connects to a socket.
    pub(super) fn connect(&self, file: &str) -> io::Result<UnixStream> {
        UnixStream::connect(self.short(file))
    }

    /// Removes a socket that nobody listens on. To be called under the lock.
    ///
    /// Gives true when the name is free afterwards, false when there is a listener.
    pub(super) fn clear(&self, file: &str) -> io::Result<bool> {
        match self.connect(file) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            // Another user's job.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(false),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let path = self.path_of(file);
                if !fs::symlink_metadata(&path)?.file_type().is_socket() {
                    return Err(io::Error::other(format!(
                        "{} is not a socket; remove it, or give the job another --name",
                        path.display()
                    )));
                }
                fs::remove_file(&path)?;
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_file_names_and_long_ones_stay_apart() {
        assert_eq!(file_name("flights"), "flights.sock");
        assert_eq!(file_name(".."), "...sock");
        let long = |end: &str| file_name(&format!("{}{end}", "é".repeat(200)));
        assert_ne!(long("a"), long("b"));
        for name in [long("a"), file_name("tab\there"), file_name(&"x".repeat(57))] {
            assert!(name.len() <= NAME_MAX + SUFFIX.len() && name.contains('~'), "{name}");
        }
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("room");
        let path = folder.path().join("sockets");
        make(&path).expect("made");
        make(&path).expect("there");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("ours");
        assert!(make(&path).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).expect("made");
        assert!(make(&link).is_err(), "a link may lead anywhere");
    }
}
