//! The parts of a folder: files that readers may take as soon as they have their final name.
//!
//! ```text
//! job without checkpoints   part-SSS.EXT.open       one for each subtask SSS; all of them become
//!                           part-SSS.EXT            final at once, when the job has ended well
//! job with checkpoints      part-SSS-NNNNNN.EXT.open
//!                           part-SSS-NNNNNN.EXT     any number; N is the epoch of the cut at which
//!                                                   the part began, 0 for the first one
//! ```
//!
//! With checkpoints, a cut closes the part that is written once it is larger than `--part-bytes`,
//! and whatever its size when all input has ended. It becomes final once a complete checkpoint
//! holds that cut: from then on nobody takes anything in it back. A drained job leaves what no
//! checkpoint holds `.open`: that is written again when the job goes on.
//!
//! Invariants (R13):
//! - the position names the part that is written and its bytes; parts with a higher number were
//!   begun by steps or runs that do not count any more and are removed on opening; those with a
//!   lower one are closed;
//! - a part with no bytes has no file: it is created by the first step that writes;
//! - a part is closed by a move of the position, inside the step's transaction; it is renamed after
//!   the checkpoint is complete, outside of any: whoever dies in between leaves a closed part with
//!   an open name, and the successor renames it;
//! - until then every cut syncs it, and the folder.
//!
//! Called by the file sink and, for names, by `supervisor/outputs`.

use super::append::{AppendFile, Refusal, changed};
use super::file::Written;
use crate::testing::refused;
use crate::worker::context::SharedFiles;
use std::cell::RefCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What the name of an unfinished part ends in.
pub(crate) const OPEN: &str = ".open";

/// The final name of a part; `number` where the job takes checkpoints.
pub(crate) fn name(subtask: usize, number: Option<u64>, extension: &str) -> String {
    match number {
        Some(number) => format!("part-{subtask:03}-{number:06}.{extension}"),
        None => format!("part-{subtask:03}.{extension}"),
    }
}

/// A numbered part's file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Found {
    pub(crate) subtask: usize,
    pub(crate) number: u64,
    pub(crate) is_open: bool,
    pub(crate) path: PathBuf,
}

impl Found {
    fn of(path: PathBuf, extension: &str) -> Option<Self> {
        let file = path.file_name()?.to_str()?.to_owned();
        let (subtask, rest) = file.strip_prefix("part-")?.split_once('-')?;
        let (number, ending) = rest.split_once('.')?;
        let (subtask, number) = (subtask.parse().ok()?, number.parse().ok()?);
        let is_open = ending.strip_suffix(OPEN) == Some(extension);
        (is_open || ending == extension).then_some(Self { subtask, number, is_open, path })
    }
}

/// All numbered parts in a folder, in order; none where there is no folder.
pub(crate) fn list(folder: &Path, extension: &str) -> Result<Vec<Found>, String> {
    let failed = |error| format!("cannot list {}: {error}", folder.display());
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(Found::of(entry.map_err(failed)?.path(), extension));
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), String> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Renames a part, unless that is done already.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), Refusal> {
    match refused(to).and_then(|()| std::fs::rename(from, to)) {
        Err(_) if !from.exists() && to.exists() => Ok(()),
        done => done.map_err(|error| {
            let what = format!("cannot rename {} to {}: {error}", from.display(), to.display());
            Refusal::new(what, &error)
        }),
    }
}

/// Where a subtask's parts are and what they are like.
#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    pub(crate) folder: PathBuf,
    pub(crate) extension: String,
    pub(crate) subtask: usize,
    pub(crate) header: Option<String>,
    /// Bytes beyond which a part is closed.
    pub(crate) part_bytes: u64,
}

impl Shelf {
    fn path(&self, number: u64, is_open: bool) -> PathBuf {
        let mut name = name(self.subtask, Some(number), &self.extension);
        if is_open {
            name.push_str(OPEN);
        }
        self.folder.join(name)
    }
}

/// The file of a part, whatever its name is by now, and its bytes if it is there.
pub(crate) fn bytes_of(shelf: &Shelf, number: u64) -> (PathBuf, Option<u64>) {
    let bytes = |path: &Path| std::fs::metadata(path).ok().map(|meta| meta.len());
    let (open, last) = (shelf.path(number, true), shelf.path(number, false));
    match (bytes(&open), bytes(&last)) {
        (None, Some(found)) => (last, Some(found)),
        (found, _) => (open, found),
    }
}

/// The parts of one subtask, the last of which is being written.
#[derive(Debug)]
pub(crate) struct Parts {
    shelf: Shelf,
    /// Number of the part that is written, or that the next bytes begin.
    number: u64,
    open: Option<AppendFile>,
    /// Numbers of closed parts that are not final yet, ascending.
    closed: Vec<u64>,
    /// The folder, the closed parts in order, and the open one, for cuts to sync.
    files: SharedFiles,
}

impl Parts {
    /// Opens a subtask's parts at a position, taking back what lies beyond it.
    pub(crate) fn open(shelf: Shelf, from: &Written) -> Result<Self, String> {
        let failed = |error| format!("cannot open folder {}: {error}", shelf.folder.display());
        let mut files = vec![File::open(&shelf.folder).map_err(failed)?];
        let mut closed = Vec::new();
        let all = list(&shelf.folder, &shelf.extension)?;
        for part in all.into_iter().filter(|part| part.subtask == shelf.subtask) {
            let is_begun = part.number == from.part && from.bytes > 0;
            if part.number >= from.part && !is_begun {
                remove(&part.path)?;
            } else if part.number < from.part && part.is_open {
                let file = File::open(&part.path);
                files.push(file.map_err(|e| format!("cannot open {}: {e}", part.path.display()))?);
                closed.push(part.number);
            }
        }
        let open = if from.bytes > 0 { reopen(&shelf, from)? } else { None };
        if let Some(open) = &open {
            files.push(open.handle()?);
        }
        let files = Rc::new(RefCell::new(files));
        Ok(Self { shelf, number: from.part, open, closed, files })
    }

    pub(crate) fn files(&self) -> SharedFiles {
        Rc::clone(&self.files)
    }

    /// Writes a step's lines, which may begin a part.
    pub(crate) fn append(&mut self, lines: &[u8], position: &mut Written) -> Result<(), Refusal> {
        if lines.is_empty() {
            return Ok(());
        }
        if let Some(open) = &mut self.open
            && position.bytes > 0
        {
            return open.try_append(lines, &mut position.bytes);
        }
        if position.bytes > 0 {
            // That part was made final while this subtask was not there. No part has the next
            // number: this one did not begin at the last cut, since it has bytes in it.
            *position = Written { bytes: 0, part: position.part + 1 };
        }
        self.number = position.part;
        // There already, and empty, if an earlier try got no further.
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                let open = AppendFile::try_open(&self.shelf.path(self.number, true), 0)?;
                self.files.borrow_mut().push(open.handle()?);
                open
            }
        };
        let mut bytes = Vec::new();
        if let Some(header) = &self.shelf.header {
            bytes.extend_from_slice(header.as_bytes());
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(lines);
        let done = open.try_append(&bytes, &mut position.bytes);
        self.open = Some(open);
        done
    }

    /// At a cut: closes the part that is written, if it is large enough or the last one.
    pub(crate) fn close(&mut self, epoch: u64, is_last: bool, position: &mut Written) {
        let is_full = position.bytes > self.shelf.part_bytes;
        if self.open.is_some() && (is_full || is_last) {
            self.open = None;
            self.closed.push(self.number);
            self.number = epoch;
            *position = Written { bytes: 0, part: epoch };
        }
    }

    /// Gives all parts their final names that a cut up to `epoch` has closed. A part was closed by
    /// the cut that the next one is numbered after.
    pub(crate) fn commit(&mut self, epoch: u64) -> Result<(), Refusal> {
        while let Some(&number) = self.closed.first() {
            let closed_at = self.closed.get(1).copied().unwrap_or(self.number);
            if closed_at > epoch {
                break;
            }
            rename(&self.shelf.path(number, true), &self.shelf.path(number, false))?;
            self.closed.remove(0);
            self.files.borrow_mut().remove(1);
        }
        Ok(())
    }

    /// Nothing more comes: the part that was written is final as well.
    pub(crate) fn end(mut self, epoch: u64) -> Result<(), String> {
        self.commit(epoch).map_err(|refusal| refusal.message)?;
        if self.open.take().is_some() {
            let number = self.number;
            rename(&self.shelf.path(number, true), &self.shelf.path(number, false))
                .map_err(|refusal| refusal.message)?;
        }
        Ok(())
    }
}

/// The part that is written, cut at its position. `None` when it was made final as it is.
fn reopen(shelf: &Shelf, from: &Written) -> Result<Option<AppendFile>, String> {
    let (open, last) = (shelf.path(from.part, true), shelf.path(from.part, false));
    if !open.exists() {
        let found = std::fs::metadata(&last).map_or(0, |meta| meta.len());
        if found == from.bytes {
            return Ok(None);
        }
        if found < from.bytes {
            return Err(changed(&open, found, from.bytes));
        }
        // The job goes back to a checkpoint before the one that made it final.
        rename(&last, &open).map_err(|refusal| refusal.message)?;
    }
    AppendFile::open(&open, from.bytes).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_what_they_are() {
        let path = |name: &str| Path::new("folder").join(name);
        let found = |name: &str| Found::of(path(name), "csv.txt");
        let part = |number, is_open, name: &str| {
            Some(Found { subtask: 12, number, is_open, path: path(name) })
        };
        assert_eq!(name(12, Some(7), "csv.txt"), "part-012-000007.csv.txt");
        assert_eq!(found("part-012-000007.csv.txt"), part(7, false, "part-012-000007.csv.txt"));
        let open = "part-012-12345678.csv.txt.open";
        assert_eq!(found(open), part(12_345_678, true, open));
        for other in ["part-012.csv.txt", "part-012-7.csv", "part-x-7.csv.txt", "notes.csv.txt"] {
            assert_eq!(found(other), None, "{other}");
        }
    }
}
