//! Outputs: one job per file or folder. Claimed with a lock that the workers inherit, so that it is
//! held until the last process that could write is gone; then emptied.
//!
//! Called by `launch` before any worker starts.

#![expect(unsafe_code, reason = "flock; an inherited descriptor")]

use super::resume::Resumed;
use crate::error::Error;
use crate::plan::{Output, Plan};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long to wait for a job that is about to die.
const PATIENCE: Duration = Duration::from_secs(5);

/// The claimed outputs of a job; given up when dropped and all workers are gone.
#[derive(Debug)]
pub(crate) struct Outputs {
    _locks: Vec<File>,
}

impl Outputs {
    /// Claims all outputs of a plan, and changes none: a job that is refused has touched nothing.
    pub(crate) fn claim(plan: &Plan) -> Result<Self, Error> {
        let (mut locks, mut claimed) = (Vec::new(), Vec::new());
        for (output, _) in &plan.outputs {
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
                if claimed.contains(&&output.path) {
                    return Err(Error::Plan(format!(
                        "two sinks write to {}; give each an output of its own",
                        output.path.display()
                    )));
                }
                lock(&file, &output.path, meta.ino())?;
                locks.push(file);
            }
            claimed.push(&output.path);
        }
        Ok(Self { _locks: locks })
    }

    /// Empties all outputs of a plan, which are claimed: the job begins.
    pub(crate) fn empty(plan: &Plan) -> Result<(), Error> {
        for (output, stage) in &plan.outputs {
            let is_regular = std::fs::metadata(&output.path).is_ok_and(|meta| meta.is_file());
            empty(output, plan.stages[*stage].workers.len(), is_regular)?;
        }
        Ok(())
    }

    /// The job goes on, with other numbers of subtasks perhaps. Parts of subtasks that there are no
    /// more end where the checkpoint knows them; parts of new ones begin. (Those that go on are cut
    /// back by the workers that write them.)
    pub(crate) fn go_on(plan: &Plan, resumed: &Resumed) -> Result<(), Error> {
        for (output, stage) in &plan.outputs {
            let Some(extension) = &output.parts else { continue };
            let ends = resumed.positions(plan, *stage);
            let was = ends.len();
            let count = plan.stages[*stage].workers.len();
            let part = |subtask| output.path.join(part_name(subtask, extension));
            for subtask in was..count {
                begin(&part(subtask), output.header.as_deref())?;
            }
            for (subtask, &end) in ends.iter().enumerate().skip(count) {
                let path = part(subtask);
                let file = OpenOptions::new().write(true).open(&path);
                let file = file.map_err(|error| refuse(&path, &error))?;
                let found = file.metadata().map_err(|error| refuse(&path, &error))?.len();
                if found < end {
                    return Err(Error::Checkpoint(format!(
                        "output {} has {found} bytes where {end} were written: \
                         it was changed from outside; begin the job again without --resume",
                        path.display()
                    )));
                }
                file.set_len(end).map_err(|error| refuse(&path, &error))?;
            }
        }
        Ok(())
    }
}

/// Makes an empty output with its header.
fn begin(path: &Path, header: Option<&str>) -> Result<(), Error> {
    let mut file = File::create(path).map_err(|error| refuse(path, &error))?;
    if let Some(header) = header {
        writeln!(file, "{header}").map_err(|error| refuse(path, &error))?;
    }
    Ok(())
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
        if begun.elapsed() > PATIENCE {
            let holder =
                holder(inode).map_or("another process".into(), |pid| format!("process {pid}"));
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
    Ok((0..parts).map(|part| output.path.join(part_name(part, extension))).collect())
}

/// The name of a part.
pub(crate) fn part_name(part: usize, extension: &str) -> String {
    format!("part-{part:03}.{extension}")
}
