//! Standard output, as something outside of the job that may fail: written without loss while it
//! works, waited for while it has no room, given up once its reader is gone.
//!
//! What that means for the job:
//! - *no room* (a file on a full disk, a pipe that is not blocking): lines stay in their rings
//!   until there is; the job waits, since no line may be lost;
//! - *its reader is gone* (`job | head`, a terminal that was closed): if the job has no other
//!   output it ends as if it had been asked to, with exit code 0; otherwise it goes on without this
//!   one. Lines that nobody can read are counted.
//!
//! What is to be written lies in the gate's pipe, which the next supervisor finds as it is; here is
//! only what is larger than that pipe.
//!
//! Called by `console`.

use super::board::Externals;
use super::console::Gate;
use crate::error::Error;
use crate::metrics::figures::ExternalState;
use crate::time::now_ns;
use crate::worker::outside::may_pass;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;

/// What it is called in status and metrics.
const NAME: &str = "standard output";

/// First pause between two tries, doubled each time, and the longest.
const PAUSE_NS: u64 = 5_000_000;
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Printing {
    /// `None` once nobody reads any more.
    file: Option<File>,
    is_terminal: bool,
    /// What is larger than the gate's pipe, which is empty meanwhile.
    large: Vec<u8>,
    /// Bytes of it that are out.
    written: usize,
    in_a_row: u32,
    next_ns: u64,
    /// Lines that nobody could read.
    lost: u64,
    externals: Externals,
}

impl Printing {
    pub(super) fn new(externals: Externals) -> Self {
        let out = std::io::stdout();
        // A descriptor of our own: the library's buffer does not say how much of it was written.
        let file = out.as_fd().try_clone_to_owned().ok().map(File::from);
        Self {
            file,
            is_terminal: out.is_terminal(),
            large: Vec::new(),
            written: 0,
            in_a_row: 0,
            next_ns: 0,
            lost: 0,
            externals,
        }
    }

    /// Whether its reader is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.file.is_none()
    }

    /// Lines that nobody could read.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Counts lines that nobody can read.
    pub(super) fn lose(&mut self, bytes: &[u8]) {
        self.lost += memchr::memchr_iter(b'\n', bytes).count() as u64;
    }

    /// Takes what is larger than the gate's pipe, which must be empty.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.large.extend_from_slice(bytes);
    }

    /// Writes what is in the gate's pipe. True once all of it is out, or can never be.
    pub(super) fn flush(&mut self, gate: &mut Gate) -> Result<bool, Error> {
        if self.in_a_row > 0 && now_ns() < self.next_ns {
            return Ok(false);
        }
        while !self.large.is_empty() || gate.out.filled() > 0 {
            match self.write(gate) {
                Ok(0) => return self.refused(&ErrorKind::WouldBlock.into(), gate),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.refused(&error, gate),
            }
        }
        if std::mem::take(&mut self.in_a_row) > 0 {
            self.externals.works(NAME);
        }
        Ok(true)
    }

    /// Writes some of what there is; how many bytes.
    fn write(&mut self, gate: &mut Gate) -> io::Result<usize> {
        // A descriptor that could not even be copied has no reader.
        let Some(file) = &mut self.file else { return Err(ErrorKind::BrokenPipe.into()) };
        crate::testing::refused(Path::new("/dev/stdout"))?;
        if self.large.is_empty() {
            return gate.move_out(file);
        }
        let bytes = file.write(&self.large[self.written..])?;
        self.written += bytes;
        if self.written == self.large.len() {
            self.large.clear();
            self.written = 0;
        }
        Ok(bytes)
    }

    fn refused(&mut self, error: &io::Error, gate: &mut Gate) -> Result<bool, Error> {
        let errno = error.raw_os_error().unwrap_or(0);
        let has_hung_up = self.is_terminal && errno == libc::EIO;
        if error.kind() == ErrorKind::BrokenPipe || has_hung_up {
            let mut left = self.large.split_off(self.written);
            left.extend(gate.take_back().map_err(|error| unwritten(&error))?);
            self.lose(&left);
            self.large.clear();
            self.written = 0;
            self.in_a_row = 0;
            self.file = None;
            self.externals.failed(NAME, ExternalState::Failing, error.to_string());
            return Ok(true);
        }
        if error.kind() != ErrorKind::WouldBlock && !may_pass(errno) {
            return Err(unwritten(error));
        }
        if self.in_a_row == 0 && error.kind() != ErrorKind::WouldBlock {
            crate::say!("testudo: standard output: {error}; the job waits until there is room");
        }
        let pause = (PAUSE_NS << self.in_a_row.min(16)).min(PAUSE_MAX_NS);
        self.in_a_row += 1;
        self.next_ns = now_ns() + pause;
        self.externals.failed(NAME, ExternalState::Waiting, error.to_string());
        Ok(false)
    }
}

fn unwritten(error: &io::Error) -> Error {
    Error::job(NAME, format!("cannot write: {error}"))
}
