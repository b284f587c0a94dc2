//! A job's control socket: opened under the job's name, served by a thread, gone with its value.
//!
//! The thread reads and writes; requests come out of a channel, and whoever takes one answers it
//! through its [`ReplyTo`], at once or later. Neither side ever waits for the other.
//!
//! Called by the supervisor.

#![expect(unsafe_code, reason = "an inherited descriptor")]

use super::folder::{self, Folder};
use super::protocol::{Reply, Request};
use super::serve::{Answer, Server};
use crate::error::Error;
use crate::keeper::line::close_on_exec;
use crate::keeper::{self, Line, place};
use crate::supervisor::watch::event_fd;
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use testudo_shm::wait::wake_event;

/// Requests that wait for the supervisor; the next one is told to come again.
const REQUESTS_MAX: usize = 64;

/// A socket as its keeper holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    name: String,
    path: PathBuf,
    listener: RawFd,
}

/// A job's control socket; dropping it ends the thread and removes the socket.
#[derive(Debug)]
pub struct ControlSocket {
    name: String,
    path: PathBuf,
    /// Device and inode of the socket's file, to remove no other.
    file: (u64, u64),
    requests: Receiver<(Request, ReplyTo)>,
    /// The listener once more, where a later supervisor is to have it.
    listener: OwnedFd,
    kept: Option<RawFd>,
    /// Rings in the thread: an answer, or the end.
    bell: Arc<OwnedFd>,
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ControlSocket {
    /// Opens the socket of a job. Where another running job has the name already, this one's
    /// socket is called `NAME-PID`: both run on, and [`name`](Self::name) says which is which.
    ///
    /// `wake` is called by the thread after each request that it put into
    /// [`requests`](Self::requests), to wake whoever is to look.
    ///
    /// # Errors
    /// No folder can be used, or something that is no socket is in the way.
    pub fn open(name: &str, wake: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let folder = folder::usable().map_err(|error| Error::Machine(error.to_string()))?;
        Self::open_made(&folder, name, wake)
    }

    /// Opens the socket in a folder of the caller's choice, which is made where it is not there.
    ///
    /// # Errors
    /// As [`open`](Self::open); also when others can write to the folder.
    pub fn open_in(
        folder: &Path,
        name: &str,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self, Error> {
        folder::make(folder).map_err(|error| {
            Error::Machine(format!("control sockets' folder {}: {error}", folder.display()))
        })?;
        Self::open_made(folder, name, wake)
    }

    fn open_made(
        folder: &Path,
        name: &str,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |error: io::Error| {
            Error::Machine(format!("control socket of {name} in {}: {error}", folder.display()))
        };
        let (name, path, listener) = listen(folder, name).map_err(failed)?;
        Self::serve(name, path, listener, wake)
    }

    /// Goes on with the listener of an earlier supervisor.
    pub(crate) fn adopt(kept: Kept, wake: impl Fn() + Send + 'static) -> Result<Self, Error> {
        // SAFETY: the keeper left this descriptor open for us; nothing else in this process knows
        // it.
        let listener = unsafe { UnixListener::from_raw_fd(kept.listener) };
        close_on_exec(kept.listener);
        let mut this = Self::serve(kept.name, kept.path, listener, wake)?;
        this.kept = Some(kept.listener);
        Ok(this)
    }

    fn serve(
        name: String,
        path: PathBuf,
        listener: UnixListener,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |error: io::Error| {
            Error::Machine(format!("control socket {}: {error}", path.display()))
        };
        let at = fs::symlink_metadata(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let again = listener.as_fd().try_clone_to_owned().map_err(failed)?;
        let bell = Arc::new(event_fd()?);
        let (to_job, requests) = bounded(REQUESTS_MAX);
        let (answers, from_job) = unbounded();
        let (stop, stopped) = bounded(0);
        let lines = Lines { requests: to_job, answers, bell: Arc::clone(&bell) };
        let server = Server::new(listener, lines, from_job, stopped, Box::new(wake));
        let thread = std::thread::Builder::new()
            .name("testudo-control".into())
            .spawn(move || server.run())
            .map_err(failed)?;
        let (stop, thread) = (Some(stop), Some(thread));
        let file = (at.dev(), at.ino());
        let (listener, kept) = (again, None);
        Ok(Self { name, path, file, requests, listener, kept, bell, stop, thread })
    }

    /// Has the keeper, if there is one, hold the listener for later supervisors.
    pub(crate) fn keep(&mut self, line: Option<&Line>) -> Result<(), Error> {
        let Some(line) = line else { return Ok(()) };
        let again = self.listener.try_clone();
        let again = again.map_err(|error| Error::Machine(format!("control socket: {error}")))?;
        self.listener = place(again, Some(line))?;
        line.hold(&[self.listener.as_raw_fd()])?;
        self.kept = Some(self.listener.as_raw_fd());
        Ok(())
    }

    /// What [`adopt`](Self::adopt) needs.
    pub(crate) fn kept(&self) -> Option<Kept> {
        let (name, path) = (self.name.clone(), self.path.clone());
        self.kept.map(|listener| Kept { name, path, listener })
    }

    /// The name that the job is found by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The socket's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Requests, each with the way back to whoever asked.
    #[must_use]
    pub fn requests(&self) -> &Receiver<(Request, ReplyTo)> {
        &self.requests
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Looked up first: once nobody listens, another job may take the name.
        let is_ours = |at: fs::Metadata| (at.dev(), at.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            // A file that cannot be removed is stale, and recognised as such.
            let _ = fs::remove_file(&self.path);
        }
        self.stop = None;
        wake_event(self.bell.as_raw_fd());
        if let Some(thread) = self.thread.take() {
            // It only moves lines; that it is gone is all that is wanted.
            let _ = thread.join();
        }
    }
}

/// Binds and listens under the job's name, or under its name and process id.
fn listen(folder: &Path, name: &str) -> io::Result<(String, PathBuf, UnixListener)> {
    let folder = Folder::open(folder)?;
    let lock = folder.lock()?;
    let pid = keeper::job();
    let mut taken = name.to_owned();
    if !folder.clear(&folder::file_name(&taken))? {
        taken = format!("{name}-{pid}");
        // A process may run several jobs of one name.
        let mut number = 2;
        while !folder.clear(&folder::file_name(&taken))? {
            taken = format!("{name}-{pid}-{number}");
            number += 1;
        }
    }
    // Under its final name a socket has its mode and a listener from the first moment on.
    let file = folder::file_name(&taken);
    let (new, path) = (format!(".{pid}.new"), folder.path_of(&file));
    let _ = fs::remove_file(folder.path_of(&new));
    let listener = UnixListener::bind(folder.short(&new))?;
    fs::set_permissions(folder.path_of(&new), fs::Permissions::from_mode(0o600))?;
    fs::rename(folder.path_of(&new), &path)?;
    drop(lock);
    Ok((taken, path, listener))
}

/// What the thread and its callers speak through.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) requests: Sender<(Request, ReplyTo)>,
    pub(super) answers: Sender<Answer>,
    pub(super) bell: Arc<OwnedFd>,
}

impl Lines {
    /// The way back for a request of a client.
    pub(super) fn reply_to(&self, client: u64, serial: u64) -> ReplyTo {
        let (answers, bell) = (self.answers.clone(), Arc::clone(&self.bell));
        ReplyTo { client, serial, answers, bell, is_answered: false }
    }
}

/// The way back to whoever asked. May be kept for as long as
/// [`patience`](Request::patience) says; one that is dropped tells the client that the job did not
/// answer.
#[derive(Debug)]
pub struct ReplyTo {
    client: u64,
    serial: u64,
    answers: Sender<Answer>,
    bell: Arc<OwnedFd>,
    is_answered: bool,
}

impl ReplyTo {
    /// Answers. A client that has left meanwhile changes nothing.
    pub fn send(mut self, reply: Reply) {
        self.answer(reply);
    }

    fn answer(&mut self, reply: Reply) {
        self.is_answered = true;
        let answer = Answer { client: self.client, serial: self.serial, reply };
        if self.answers.send(answer).is_ok() {
            wake_event(self.bell.as_raw_fd());
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        if !self.is_answered {
            self.answer(Reply::error("the job ended, or gave no answer"));
        }
    }
}
