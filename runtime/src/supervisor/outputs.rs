//! Outputs: one job per file or folder. Claimed with a lock that the workers inherit, so that it is
//! held until the last process that could write is gone; then emptied, or brought to where the
//! checkpoint knows them. A job that is refused leaves no output behind that was not there before.
//!
//! Called by `launch` before any worker starts, and when the job has ended well.

#![expect(unsafe_code, reason = "flock; an inherited descriptor")]

use super::resume::Resumed;
use crate::error::Error;
use crate::keeper::{self, Line, place};
use crate::plan::{Output, Plan};
use crate::sink::{SinkHooks, parts};
use crate::source::Subtask;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long to wait for a job that is about to die.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait for one whose launching process lives: it may be on its way out.
const PATIENCE_LIVING: Duration = Duration::from_millis(500);

/// The claimed outputs of a job; given up when dropped and all workers are gone.
#[derive(Debug)]
pub(crate) struct Outputs {
    made: Made,
    locks: Vec<File>,
    /// For each output of the plan, whether it is a regular file.
    is_regular: Vec<bool>,
    /// Folders get their parts from the cuts of the job.
    by_cuts: bool,
}

/// Files and folders that claiming has made: removed again, while they are empty, unless the job
/// begins. What is removed is locked by us.
#[derive(Debug, Default)]
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.drain(..).rev() {
            let meta = std::fs::symlink_metadata(&path);
            // What cannot be removed, or has something in it, stays.
            let _ = match meta {
                Ok(meta) if meta.is_dir() => std::fs::remove_dir(&path),
                Ok(meta) if meta.is_file() && meta.len() == 0 => std::fs::remove_file(&path),
                _ => Ok(()),
            };
        }
    }
}

impl Outputs {
    /// The job begins: what was made for it stays.
    pub(crate) fn keep(&mut self) {
        self.made.0.clear();
    }

    /// Whether everything is there that the sinks had written at the checkpoint.
    pub(crate) fn check(plan: &Plan, sinks: &[SinkHooks], resumed: &Resumed) -> Result<(), Error> {
        for sink in sinks {
            let count = resumed.restore.subtasks(sink.stage).unwrap_or(0);
            for index in 0..count {
                let Some((position, _)) = resumed.sink_position(plan, sink, index) else {
                    continue;
                };
                (sink.check)(Subtask { index, count }, position).map_err(|message| {
                    Error::Checkpoint(format!(
                        "checkpoint {} cannot be gone on from: sink {}: {message}; put it back, or \
                         begin afresh without --resume",
                        resumed.restore.id, plan.operators[sink.operator].name
                    ))
                })?;
            }
        }
        Ok(())
    }

    /// Claims all outputs of a plan. A job that is refused has touched none of them.
    pub(crate) fn claim(plan: &Plan, by_cuts: bool) -> Result<Self, Error> {
        let mut locks = Vec::new();
        let mut made = Made::default();
        let mut claimed: Vec<Claimed<'_>> = Vec::new();
        for (output, operator) in &plan.outputs {
            let lock_path = match &output.parts {
                None => output.path.clone(),
                Some(_) => {
                    let is_new = !output.path.exists();
                    std::fs::create_dir_all(&output.path).map_err(|e| refuse(&output.path, &e))?;
                    if is_new {
                        made.0.push(output.path.clone());
                    }
                    output.path.join(".testudo-lock")
                }
            };
            let (file, is_new) = open(&lock_path).map_err(|error| refuse(&lock_path, &error))?;
            let meta = file.metadata().map_err(|error| refuse(&lock_path, &error))?;
            if meta.is_file() {
                refuse_input(plan, &output.path, &meta)?;
                let inode = (meta.dev(), meta.ino());
                if let Some(other) = claimed.iter().find(|other| other.inode == Some(inode)) {
                    return Err(other.collides(plan, output, *operator));
                }
                lock(&file, &output.path, meta.ino())?;
                if is_new {
                    made.0.push(lock_path.clone());
                }
                locks.push(file);
            }
            let inode = meta.is_file().then(|| (meta.dev(), meta.ino()));
            claimed.push(Claimed { output, operator: *operator, inode });
        }
        let is_regular = claimed.into_iter().map(|claimed| claimed.inode.is_some()).collect();
        Ok(Self { made, locks, is_regular, by_cuts })
    }

    /// Takes over the outputs of a job that runs: its locks are held already.
    pub(crate) fn adopt(plan: &Plan, locks: &[RawFd], by_cuts: bool) -> Self {
        // SAFETY: the keeper left these descriptors open for us; nothing else in this process knows
        // them. They stay open for workers to inherit, as when they were locked.
        let locks = locks.iter().map(|fd| unsafe { File::from_raw_fd(*fd) }).collect();
        let is_regular = plan.outputs.iter().map(|(output, _)| is_file(output)).collect();
        let made = Made::default();
        Self { made, locks, is_regular, by_cuts }
    }

    /// Moves the locks to descriptors that a keeper can hold as well.
    pub(crate) fn place(&mut self, line: Option<&Line>) -> Result<(), Error> {
        if line.is_some() {
            for lock in std::mem::take(&mut self.locks) {
                let placed = File::from(place(lock.into(), line)?);
                leave_to_workers(&placed);
                self.locks.push(placed);
            }
        }
        Ok(())
    }

    /// The descriptors of the locks.
    pub(crate) fn locks(&self) -> Vec<RawFd> {
        self.locks.iter().map(AsRawFd::as_raw_fd).collect()
    }

    /// Empties all outputs: the job begins.
    pub(crate) fn empty(&self, plan: &Plan) -> Result<(), Error> {
        for ((output, operator), is_regular) in plan.outputs.iter().zip(&self.is_regular) {
            let stage = plan.operators[*operator].stage;
            let parts = if self.by_cuts { 0 } else { plan.stages[stage].workers.len() };
            empty(output, parts, *is_regular)?;
        }
        Ok(())
    }

    /// The job goes on, with other numbers of subtasks perhaps. What subtasks have left that there
    /// are no more ends where the checkpoint knows it; what the checkpoint does not know is taken
    /// back; sinks that are new begin with an empty output. (Those that go on are brought back by
    /// the workers that write them.)
    pub(crate) fn go_on(plan: &Plan, sinks: &[SinkHooks], resumed: &Resumed) -> Result<(), Error> {
        for sink in sinks {
            let count = plan.stages[sink.stage].workers.len();
            let was = resumed.restore.subtasks(sink.stage).unwrap_or(0);
            if resumed.sink_position(plan, sink, 0).is_none() {
                let own = plan.outputs.iter().filter(|(_, operator)| *operator == sink.operator);
                own.into_iter().try_for_each(|(output, _)| empty(output, 0, is_file(output)))?;
                continue;
            }
            Self::settle(plan, sink, resumed, count..was)?;
            let from = count.max(was);
            (sink.withdraw)(from, resumed.restore.last_epoch())
                .map_err(|message| Error::job(&plan.operators[sink.operator].name, message))?;
        }
        Ok(())
    }

    /// The job begins, perhaps not for the first time: nothing that was prepared before counts.
    pub(crate) fn begin(plan: &Plan, sinks: &[SinkHooks]) -> Result<(), Error> {
        for sink in sinks {
            (sink.withdraw)(plan.stages[sink.stage].workers.len(), 0)
                .map_err(|message| Error::job(&plan.operators[sink.operator].name, message))?;
        }
        Ok(())
    }

    /// The job had come to its end: what its sinks had prepared is shown, if it was not.
    pub(crate) fn end_again(
        plan: &Plan,
        sinks: &[SinkHooks],
        resumed: &Resumed,
    ) -> Result<(), Error> {
        for sink in sinks {
            let was = resumed.restore.subtasks(sink.stage).unwrap_or(0);
            Self::settle(plan, sink, resumed, 0..was)?;
        }
        Ok(())
    }

    fn settle(
        plan: &Plan,
        sink: &SinkHooks,
        resumed: &Resumed,
        subtasks: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let count = resumed.restore.subtasks(sink.stage).unwrap_or(0);
        for index in subtasks {
            let Some((position, epoch)) = resumed.sink_position(plan, sink, index) else {
                continue;
            };
            (sink.settle)(Subtask { index, count }, position, epoch)
                .map_err(|message| Error::job(&plan.operators[sink.operator].name, message))?;
        }
        Ok(())
    }

    /// The job has ended well: parts that no cut has ended are complete now.
    pub(crate) fn end(&self, plan: &Plan) -> Result<(), Error> {
        for (output, operator) in plan.outputs.iter().filter(|_| !self.by_cuts) {
            let Some(extension) = &output.parts else { continue };
            let stage = plan.operators[*operator].stage;
            for subtask in 0..plan.stages[stage].workers.len() {
                let path = output.path.join(parts::name(subtask, None, extension));
                parts::rename(&open_name(&path), &path)
                    .map_err(|refusal| Error::Machine(refusal.message))?;
            }
        }
        Ok(())
    }
}

/// What a part is called while it is written.
fn open_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(parts::OPEN);
    name.into()
}

/// Opens a file for writing as it is, and says whether it was not there before.
pub(super) fn open(path: &Path) -> std::io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    match options.write(true).create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let mut options = OpenOptions::new();
            // A link to nothing is made good.
            let file = options.write(true).create(true).truncate(false).open(path)?;
            Ok((file, false))
        }
        Err(error) => Err(error),
    }
}

fn is_file(output: &Output) -> bool {
    std::fs::metadata(&output.path).is_ok_and(|meta| meta.is_file())
}

/// Makes an empty output with its header.
fn begin(path: &Path, header: Option<&str>) -> Result<(), Error> {
    let mut file = File::create(path).map_err(|error| refuse(path, &error))?;
    if let Some(header) = header {
        writeln!(file, "{header}").map_err(|error| refuse(path, &error))?;
    }
    Ok(())
}

/// An output that this job may write.
struct Claimed<'a> {
    output: &'a Output,
    operator: usize,
    /// Device and number of what is locked: the file, or the lock file of a folder. Paths may be
    /// spelled in many ways. `None` for what is no regular file.
    inode: Option<(u64, u64)>,
}

impl Claimed<'_> {
    /// Two sinks with one output, perhaps by two names.
    fn collides(&self, plan: &Plan, output: &Output, operator: usize) -> Error {
        let names = [self.operator, operator].map(|operator| &plan.operators[operator].name);
        let (first, second) = (self.output.path.display(), output.path.display());
        let also = if self.output.path.as_os_str() == output.path.as_os_str() {
            String::new()
        } else {
            format!(", which is also {second}")
        };
        Error::Plan(format!(
            "sinks {} and {} both write to {first}{also}; give each an output of its own",
            names[0], names[1]
        ))
    }
}

/// An output that is also an input would be emptied before it is read.
fn refuse_input(plan: &Plan, path: &Path, output: &std::fs::Metadata) -> Result<(), Error> {
    for input in &plan.inputs {
        let is_same = std::fs::metadata(input)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (output.dev(), output.ino()));
        if is_same {
            return Err(Error::Plan(format!(
                "output {} is the input {}: it would be emptied before it is read; choose another",
                path.display(),
                input.display()
            )));
        }
    }
    Ok(())
}

fn refuse(path: &Path, error: &std::io::Error) -> Error {
    Error::Plan(format!("cannot write output {}: {error}", path.display()))
}

/// Locks the file, waiting a little for a job that is dying. The lock belongs to the open file,
/// which workers inherit.
fn lock(file: &File, output: &Path, inode: u64) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        // SAFETY: plain system call on an open descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            leave_to_workers(file);
            return is_still_there(file, output);
        }
        let holder = holder(inode);
        let patience = if holder.is_some_and(lives) { PATIENCE_LIVING } else { PATIENCE };
        if begun.elapsed() > patience {
            let holder = holder.map_or("another process".into(), |pid| format!("process {pid}"));
            return Err(Error::Plan(format!(
                "output {} is being written by {holder}; \
                 wait for it, stop it, or choose another output",
                output.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Workers inherit this descriptor, so that its lock outlives a killed supervisor until they end.
fn leave_to_workers(file: &File) {
    // SAFETY: plain system call on an open descriptor.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
}

/// A job that was refused meanwhile may have removed the file that it had made and we have opened.
fn is_still_there(file: &File, output: &Path) -> Result<(), Error> {
    let links = file.metadata().map_or(0, |meta| meta.nlink());
    if links > 0 {
        return Ok(());
    }
    Err(Error::Plan(format!(
        "output {} was removed while this job waited for it; start it again",
        output.display()
    )))
}

/// The process that holds the lock on an inode, from the kernel's list; of a job its launched one.
fn holder(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let of = fields.get(5)?.rsplit(':').next()?.parse::<u64>().ok()?;
        (fields.get(1) == Some(&"FLOCK") && of == inode).then(|| fields[4].parse().ok()).flatten()
    });
    pid.map(keeper::job_of)
}

/// Whether a process runs, not dead and only waiting to be reaped.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with(['Z', 'X']))
}

/// Empties an output: truncates the file, or removes old parts and makes new ones. Headers are
/// written here.
fn empty(output: &Output, parts: usize, is_regular: bool) -> Result<(), Error> {
    for path in files(output, parts)? {
        if output.parts.is_none() && !is_regular {
            continue;
        }
        begin(&path, output.header.as_deref())?;
    }
    Ok(())
}

/// The files of an output; for a folder, those of the parts, after removing what an earlier job
/// left there.
fn files(output: &Output, parts: usize) -> Result<Vec<PathBuf>, Error> {
    let Some(extension) = &output.parts else {
        return Ok(vec![output.path.clone()]);
    };
    let old = std::fs::read_dir(&output.path).map_err(|error| refuse(&output.path, &error))?;
    for entry in old.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("part-") {
            std::fs::remove_file(entry.path()).map_err(|error| refuse(&entry.path(), &error))?;
        }
    }
    let name = |part| open_name(&output.path.join(parts::name(part, None, extension)));
    Ok((0..parts).map(name).collect())
}
