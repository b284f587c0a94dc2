//! The dead-letter file: records that killed their worker again and again, one JSON object a line.
//!
//! Invariants (R13):
//! - a line is on disk before the worker that put its record aside takes another step, so a
//!   checkpoint that holds the passing over of a record finds its line there;
//! - a letter is written once: who takes over finds the number of the last line of each worker in
//!   the file; half a line, from a death in the middle of writing, is cut off;
//! - a job that goes on from a checkpoint withdraws the lines that the checkpoint does not hold:
//!   the records come again. One that begins afresh withdraws its own of earlier runs, as it
//!   empties its outputs;
//! - a file that cannot be written is tried again: the worker waits, the others go on.
//!
//! Called by `care` at each look at a worker, and by `launch` before anything starts.

use super::outputs;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::Plan;
use crate::time::now_ns;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes of the job's name in the file's.
const NAME_MAX: usize = 200;

/// First pause before a file that could not be written is tried again; doubled up to a second.
const PAUSE_NS: u64 = 10_000_000;
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// A line of the file.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    /// When it was put aside, UTC.
    pub(crate) time: String,
    pub(crate) job: String,
    /// The worker that it killed, the number of its letter, and the last cut before it.
    pub(crate) worker: usize,
    pub(crate) number: u64,
    pub(crate) epoch: u64,
    /// The operators that it killed it in.
    pub(crate) operator: String,
    /// Where it came from: source and place, or exchange and place.
    pub(crate) input: String,
    pub(crate) origin: String,
    /// Which of the records that were handed on within the worker, where it is one of those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) handed_on: Option<u64>,
    /// What it did, the last time.
    pub(crate) error: String,
    /// Its bytes, in hexadecimal digits; the first of them if there are more than `total`.
    pub(crate) bytes: String,
    pub(crate) total: u64,
    /// The same as text, where they are some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
}

/// What is read of a line again.
#[derive(Debug, Deserialize)]
struct Known {
    #[serde(default)]
    job: String,
    worker: usize,
    number: u64,
    epoch: u64,
}

/// What is known of a line when a worker goes on from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// The checkpoint does not hold its letter: the record comes again.
    No,
    /// The checkpoint holds it. The worker counts its letters from the beginning again.
    Before,
    /// Nothing has changed for its worker.
    Still,
}

impl Held {
    /// Of a worker that goes on from the cut `of`, if from any: a letter of this epoch.
    pub(crate) fn by(of: Option<&u64>, epoch: u64) -> Self {
        if of.is_some_and(|of| epoch < *of) { Self::Before } else { Self::No }
    }
}

/// A line of ours whose letter is counted no more.
fn without_number(line: &[u8]) -> Vec<u8> {
    let known = serde_json::from_slice::<Known>(line).map_or(0, |known| known.number);
    let text = String::from_utf8_lossy(line);
    text.replacen(&format!(r#""number":{known},"#), r#""number":0,"#, 1).into_bytes()
}

/// The file, which is made with its first line.
#[derive(Debug)]
pub(crate) struct DeadLetters {
    path: PathBuf,
    job: String,
    file: Option<File>,
    end: u64,
    /// The number of the last line of each worker.
    last: HashMap<usize, u64>,
    pause_ns: u64,
    retry_ns: u64,
}

/// Where a job's dead letters go.
pub(crate) fn path(plan: &Plan, settings: &Settings) -> PathBuf {
    if let Some(path) = &settings.dead_letters {
        return path.clone();
    }
    let is_real = |path: &&PathBuf| path.is_file() || path.is_dir();
    let outputs = plan.outputs.iter().map(|(output, _)| &output.path);
    let folder = outputs.into_iter().find(is_real).and_then(|path| path.parent());
    // A file's name is shorter than a job's may be.
    let mut end = settings.name.len().min(NAME_MAX);
    while !settings.name.is_char_boundary(end) {
        end -= 1;
    }
    folder.unwrap_or(Path::new("")).join(format!("{}.dead-letters.jsonl", &settings.name[..end]))
}

/// Whether the file of `--dead-letters` could be written, if it had to be: what is found out only
/// when a record has killed its worker holds that worker up. The outputs are claimed, so they are
/// there.
pub(crate) fn check(plan: &Plan, settings: &Settings) -> Result<(), Error> {
    let Some(path) = &settings.dead_letters else { return Ok(()) };
    let refuse =
        |why: String| Err(Error::Usage(format!("--dead-letters {}: {why}", path.display())));
    let number = |path: &Path| {
        std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|m| (m.dev(), m.ino()))
    };
    let own = number(path);
    let outputs = plan.outputs.iter().map(|(output, _)| &output.path);
    let mut used = outputs.chain(&plan.inputs);
    if let Some(other) = used.find(|other| own.is_some() && number(other) == own) {
        let other = other.display();
        return refuse(format!("the job uses {other} for something else; choose another file"));
    }
    if own.is_none() && path.exists() && !path.is_dir() {
        // A pipe or a device: opening it may wait, or do something.
        return Ok(());
    }
    match outputs::open(path) {
        Ok((_, is_new)) => {
            if is_new {
                // It is made with its first line. What cannot be removed stays, empty.
                let _ = std::fs::remove_file(path);
            }
            Ok(())
        }
        Err(error) => {
            refuse(format!("it cannot be written: {error}; name a file in a folder that is there"))
        }
    }
}

impl DeadLetters {
    /// The file as it is: for a supervisor that goes on.
    pub(crate) fn new(path: PathBuf, job: &str) -> Self {
        Self {
            path,
            job: job.into(),
            file: None,
            end: 0,
            last: HashMap::new(),
            pause_ns: PAUSE_NS,
            retry_ns: 0,
        }
    }

    /// Whether a worker's letter of this number is written down.
    pub(crate) fn has(&self, worker: usize, number: u64) -> bool {
        self.last.get(&worker).is_some_and(|last| *last >= number)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Withdraws this job's lines that are not `held` (worker, epoch). The file is opened anew for
    /// the next line.
    pub(crate) fn withdraw(&mut self, held: impl Fn(usize, u64) -> Held) -> Result<(), Error> {
        (self.file, self.end) = (None, 0);
        self.last.clear();
        let failed = |error: std::io::Error| {
            let path = self.path.display();
            Error::Plan(format!("cannot write dead letters {path}: {error}; see --dead-letters"))
        };
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        let mut kept: Vec<u8> = Vec::new();
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let own = serde_json::from_slice::<Known>(line).ok();
            let own = own.filter(|known| known.job == self.job);
            match own.map_or(Held::Still, |known| held(known.worker, known.epoch)) {
                _ if !line.ends_with(b"\n") => {}
                Held::No => {}
                Held::Before => kept.extend_from_slice(&without_number(line)),
                Held::Still => kept.extend_from_slice(line),
            }
        }
        if kept == text {
            return Ok(());
        }
        if kept.is_empty() {
            return std::fs::remove_file(&self.path).map_err(failed);
        }
        let mut other = self.path.as_os_str().to_owned();
        other.push(".new");
        let write = || {
            let mut file = File::create(&other)?;
            file.write_all(&kept)?;
            file.sync_data()?;
            std::fs::rename(&other, &self.path)
        };
        write().map_err(failed)
    }

    /// Writes a letter down, unless it was before; false when that has to be tried again. Says so
    /// once.
    pub(crate) fn take(&mut self, worker: usize, number: u64, line: impl FnOnce() -> Line) -> bool {
        if self.retry_ns > now_ns() {
            return false;
        }
        match self.try_take(worker, number, line) {
            Ok(()) => {
                self.pause_ns = PAUSE_NS;
                true
            }
            Err(error) => {
                if self.pause_ns == PAUSE_NS {
                    crate::say!(
                        "testudo: cannot write dead letters {}: {error}; worker {worker} waits \
                         until that is possible",
                        self.path.display()
                    );
                }
                self.retry_ns = now_ns() + self.pause_ns;
                self.pause_ns = (self.pause_ns * 2).min(PAUSE_MAX_NS);
                false
            }
        }
    }

    fn try_take(
        &mut self,
        worker: usize,
        number: u64,
        line: impl FnOnce() -> Line,
    ) -> Result<(), std::io::Error> {
        if self.file.is_none() {
            self.open()?;
        }
        if self.last.get(&worker).is_some_and(|last| *last >= number) {
            return Ok(());
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = line();
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        // What a failed try has left is written over.
        file.seek(SeekFrom::Start(self.end))?;
        file.write_all(&text)?;
        file.sync_data()?;
        self.end += text.len() as u64;
        self.last.insert(worker, number);
        Ok(())
    }

    /// Opens the file and finds out what is there already.
    fn open(&mut self) -> Result<(), std::io::Error> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&self.path)?;
        let text = std::fs::read(&self.path)?;
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let known = |line: &[u8]| serde_json::from_slice::<Known>(line).ok();
        for known in text[..end].split_inclusive(|byte| *byte == b'\n').filter_map(known) {
            if known.job == self.job {
                self.last.insert(known.worker, known.number);
            }
        }
        file.set_len(end as u64)?;
        (self.file, self.end) = (Some(file), end as u64);
        Ok(())
    }
}
