//! Outputs: one job per file or folder. Claimed with a lock that the workers inherit, so that it is
//! held until the last process that could write is gone; then emptied, or brought to where the
//! checkpoint knows them.
//!
//! Called by `launch` before any worker starts, and when the job has ended well.

#![expect(unsafe_code, reason = "flock; an inherited descriptor")]

use super::resume::Resumed;
use crate::error::Error;
use crate::plan::{Output, Plan};
use crate::sink::{SinkHooks, parts};
use crate::source::Subtask;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
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
    _locks: Vec<File>,
    /// For each output of the plan, whether it is a regular file.
    is_regular: Vec<bool>,
    /// Folders get their parts from the cuts of the job.
    by_cuts: bool,
}

impl Outputs {
    /// Claims all outputs of a plan. A job that is refused has touched none of them.
    pub(crate) fn claim(plan: &Plan, by_cuts: bool) -> Result<Self, Error> {
        let mut locks = Vec::new();
        let mut claimed: Vec<Claimed<'_>> = Vec::new();
        for (output, operator) in &plan.outputs {
            let lock_path = match &output.parts {
                None => output.path.clone(),
                Some(_) => {
                    std::fs::create_dir_all(&output.path).map_err(|e| refuse(&output.path, &e))?;
                    output.path.join(".testudo-lock")
                }
            };
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(false).open(&lock_path);
            let file = file.map_err(|error| refuse(&lock_path, &error))?;
            let meta = file.metadata().map_err(|error| refuse(&lock_path, &error))?;
            if meta.is_file() {
                refuse_input(plan, &output.path, &meta)?;
                let inode = (meta.dev(), meta.ino());
                if let Some(other) = claimed.iter().find(|other| other.inode == Some(inode)) {
                    return Err(other.collides(plan, output, *operator));
                }
                lock(&file, &output.path, meta.ino())?;
                locks.push(file);
            }
            let inode = meta.is_file().then(|| (meta.dev(), meta.ino()));
            claimed.push(Claimed { output, operator: *operator, inode });
        }
        let is_regular = claimed.into_iter().map(|claimed| claimed.inode.is_some()).collect();
        Ok(Self { _locks: locks, is_regular, by_cuts })
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
                parts::rename(&open_name(&path), &path).map_err(Error::Machine)?;
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
            // SAFETY: as above: workers are to inherit it, so that it outlives a killed supervisor
            // until they end.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
            return Ok(());
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

/// The process that holds the lock on an inode, from the kernel's list.
fn holder(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let of = fields.get(5)?.rsplit(':').next()?.parse::<u64>().ok()?;
        (fields.get(1) == Some(&"FLOCK") && of == inode).then(|| fields[4].parse().ok()).flatten()
    })
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
