//! The other end of control sockets: finds jobs and asks them.
//!
//! Called by the `testudo` tool; programs may use it as well.

use super::folder::{self, Folder};
use super::protocol::{REPLY_MAX, Reply, Request, line};
use super::system;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why there is no answer.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// No running job has this name.
    NoJob {
        /// The name.
        name: String,
        /// The names that there are.
        others: Vec<String>,
    },
    /// The job's socket cannot be used.
    Socket {
        /// Its file.
        path: PathBuf,
        /// What happened.
        why: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoJob { name, others } if others.is_empty() => {
                write!(f, "no job is called {name:?}; none is running")
            }
            Self::NoJob { name, others } => {
                write!(f, "no job is called {name:?}; running: {}", others.join(", "))
            }
            Self::Socket { path, why } => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl std::error::Error for Failure {}

/// A running job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The name that its socket's file shows.
    pub name: String,
    /// The socket's file.
    pub path: PathBuf,
}

/// The running jobs in these folders; stale sockets are removed on the way.
///
/// See [`candidates`](folder::candidates) for the usual folders.
#[must_use]
pub fn jobs(folders: &[PathBuf]) -> Vec<Found> {
    let mut jobs = Vec::new();
    for path in folders {
        let Ok(folder) = Folder::open(path) else { continue };
        for (name, path) in folder::sockets(path) {
            if is_stale(&folder, &path) {
                continue;
            }
            jobs.push(Found { name, path });
        }
    }
    jobs.sort_by(|a, b| a.name.cmp(&b.name));
    jobs
}

/// True when nobody listens; the socket is removed where that is allowed.
fn is_stale(folder: &Folder, path: &Path) -> bool {
    let Some(file) = path.file_name().and_then(|name| name.to_str()) else { return false };
    match folder.connect(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => true,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            // Looked at again under the lock: a new job may be taking the name.
            let cleared = folder.lock().and_then(|_lock| folder.clear(file));
            cleared.unwrap_or(true)
        }
        _ => false,
    }
}

/// Asks a job, found by its name in these folders.
///
/// # Errors
/// There is no such job, or it does not answer as it should.
pub fn ask(folders: &[PathBuf], name: &str, request: &Request) -> Result<Reply, Failure> {
    let file = folder::file_name(name);
    for path in folders {
        let Ok(folder) = Folder::open(path) else { continue };
        let failed = |why: String| Failure::Socket { path: folder.path_of(&file), why };
        match folder.connect(&file) {
            Ok(stream) => return exchange(stream, request).map_err(failed),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {}
                ErrorKind::PermissionDenied => {
                    return Err(failed("the job is another user's".into()));
                }
                _ => return Err(failed(error.to_string())),
            },
        }
    }
    let others = jobs(folders).into_iter().map(|job| job.name).collect();
    Err(Failure::NoJob { name: name.to_owned(), others })
}

/// Asks the job behind a socket's file.
///
/// # Errors
/// It does not answer as it should.
pub fn ask_at(path: &Path, request: &Request) -> Result<Reply, Failure> {
    let failed = |why: String| Failure::Socket { path: path.to_owned(), why };
    let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
        return Err(failed("this is no file".into()));
    };
    let stream = Folder::open(parent).and_then(|folder| folder.connect(&file.to_string_lossy()));
    exchange(stream.map_err(|error| failed(error.to_string()))?, request).map_err(failed)
}

/// How much longer than the job's own limit an answer is waited for.
const GRACE: Duration = Duration::from_secs(5);

fn exchange(mut stream: UnixStream, request: &Request) -> Result<Reply, String> {
    let text = |error: io::Error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "the job does not answer".to_owned(),
        _ => error.to_string(),
    };
    match system::peer_user(&stream).map_err(text)? {
        peer if peer == system::user() || peer == 0 || system::user() == 0 => {}
        peer => return Err(format!("who listens here is user {peer}, not this one")),
    }
    stream.set_write_timeout(Some(GRACE)).map_err(text)?;
    // One that refuses to listen may have said why: the answer is read all the same.
    let written = stream.write_all(&line(request));
    let answer = read_line(&mut stream, request.patience() + GRACE).map_err(text)?;
    if answer.is_empty() {
        written.map_err(text)?;
        return Err("the job closed the connection; it may have ended".into());
    }
    serde_json::from_slice(&answer).map_err(|error| format!("the answer is none: {error}"))
}

/// A line, or what there is of it at the end.
fn read_line(stream: &mut UnixStream, patience: Duration) -> io::Result<Vec<u8>> {
    let until = Instant::now() + patience;
    let mut answer = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let count = match stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // It left without reading all; what it said before is here.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        answer.extend_from_slice(&buffer[..count]);
        if count == 0 || answer.ends_with(b"\n") {
            return Ok(answer);
        }
        if answer.len() > REPLY_MAX {
            return Err(io::Error::other(format!("the answer has more than {REPLY_MAX} bytes")));
        }
    }
}
