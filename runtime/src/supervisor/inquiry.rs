//! Finding out what a program would do with this job, before anything is stopped: whether its file
//! is a job of Testudo's at all, and how it plans (`worker/inspect.rs`).
//!
//! Invariant: a program without the mark of this library is never started: it would do whatever it
//! does with the job's arguments.
//!
//! Called by `update`.

use super::program::Program;
use super::recover::Crew;
use super::spawn::{Child, kill, readable_pipe, reap};
use crate::error::Error;
use crate::plan::described::Described;
use crate::time::now_ns;
use crate::worker::inspect::Answer;
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// In every program that links this library.
static MARK: [u8; 48] = *b"testudo job program, to be asked by its pipe \x01\x02\x03";

/// Longest time for an answer.
const PATIENCE_NS: u64 = 20_000_000_000;

/// Longest answer: a plan has at most some thousand operators.
const ANSWER_MAX: usize = 16 << 20;

/// Whether a file can be the program of a job; it is held from then on.
pub(super) fn check(path: &Path) -> Result<Program, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut file = File::open(path).map_err(text)?;
    let about = file.metadata().map_err(text)?;
    if !about.is_file() {
        return Err("this is no file".into());
    }
    if about.permissions().mode() & 0o111 == 0 {
        return Err("it is not executable (chmod +x)".into());
    }
    if !has_mark(&mut file).map_err(text)? {
        return Err("this is no program that runs a Testudo job".into());
    }
    Program::of_file(path, file).map_err(text)
}

/// Looks for an ELF header and the mark.
fn has_mark(file: &mut File) -> std::io::Result<bool> {
    const PIECE: usize = 1 << 20;
    let finder = memchr::memmem::Finder::new(&MARK);
    let mut bytes = Vec::with_capacity(PIECE + MARK.len());
    let mut is_first = true;
    loop {
        let kept = bytes.len();
        let count = file.by_ref().take(PIECE as u64).read_to_end(&mut bytes)?;
        if is_first && !bytes.starts_with(b"\x7FELF") {
            return Ok(false);
        }
        is_first = false;
        if finder.find(&bytes).is_some() {
            return Ok(true);
        }
        if count == 0 {
            return Ok(false);
        }
        // It may lie across two pieces.
        bytes.drain(..(kept + count).saturating_sub(MARK.len()));
    }
}

/// A program that is being asked; its process ends with this value.
#[derive(Debug)]
pub(super) struct Inquiry {
    child: Child,
    pipe: PipeReader,
    said: Vec<u8>,
    begun_ns: u64,
    who: &'static str,
    answer: Option<Described>,
}

impl Inquiry {
    pub(super) fn begin(
        crew: &Crew<'_>,
        program: &Program,
        who: &'static str,
    ) -> Result<Self, Error> {
        let (pipe, theirs) = readable_pipe()?;
        let (fd, bytes) = (crew.scene.control_peer.as_raw_fd(), crew.scene.control.len());
        let child = crew.spawner.inquire(program, theirs.as_raw_fd(), fd, bytes)?;
        let said = Vec::new();
        Ok(Self { child, pipe, said, begun_ns: now_ns(), who, answer: None })
    }

    /// The answer, once there is one: from then on always the same.
    pub(super) fn look(&mut self) -> Option<Result<Described, String>> {
        if let Some(answer) = &self.answer {
            return Some(Ok(answer.clone()));
        }
        let who = self.who;
        let has_ended = self.child.ends_within(std::time::Duration::ZERO);
        let mut buffer = [0; 64 << 10];
        while let Ok(count @ 1..) = self.pipe.read(&mut buffer) {
            self.said.extend_from_slice(&buffer[..count]);
            if self.said.len() > ANSWER_MAX {
                return Some(Err(format!("{who} describes itself without end")));
            }
        }
        if self.said.ends_with(b"\n") {
            return Some(match serde_json::from_slice(&self.said) {
                Ok(Answer::Plan(plan)) => {
                    self.answer = Some((*plan).clone());
                    Ok(*plan)
                }
                Ok(Answer::Refused(why)) => Err(format!("{who} cannot run this job: {why}")),
                Err(error) => Err(format!("{who} describes its plan in another form: {error}")),
            });
        }
        if has_ended {
            let how = reap(self.child.pid, true).map_or("unknown".into(), |exit| exit.to_string());
            return Some(Err(format!("{who} ended ({how}) without describing its plan")));
        }
        let is_late = now_ns() - self.begun_ns > PATIENCE_NS;
        is_late.then(|| Err(format!("{who} did not describe its plan within 20 s")))
    }
}

impl Drop for Inquiry {
    fn drop(&mut self) {
        // Nothing more is expected of it. Reaped before or not, it is ours until here.
        if !self.child.ends_within(std::time::Duration::ZERO) {
            kill(self.child.pid);
        }
        reap(self.child.pid, true);
    }
}
