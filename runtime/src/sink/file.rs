//! File sinks: CSV, JSON lines, or any text; to one file (parallelism 1) or to a folder (parts for
//! each subtask).
//!
//! An existing output is overwritten: the launching process truncates it, and removes old parts,
//! before workers start. Exact across kills through [`AppendFile`]; across crashes of the machine
//! too, where the job takes checkpoints: a file is then cut back when the job goes on, parts are as
//! `sink/parts.rs` says.
//!
//! Called through [`Sink`].

use super::append::{AppendFile, Refusal};
use super::parts::{self, Parts, Shelf};
use super::{Cut, Sink, Writer};
use crate::config::Settings;
use crate::plan::Output;
use crate::source::Subtask;
use crate::worker::context::SharedFiles;
use serde::Serialize;
use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use testudo_shm::record::Record;

/// Turns a record into the bytes of its line, newline included.
pub trait Format<T: Record>: Send + Sync + 'static {
    /// Appends the record's line.
    ///
    /// # Errors
    /// Why it cannot be written, as text.
    fn line(&self, record: &T::View, out: &mut Vec<u8>) -> Result<(), String>;
}

/// CSV lines of what a closure makes of a record: anything serde can write as a row.
#[derive(Debug)]
pub struct Csv<F>(pub F);

impl<T: Record, R: Serialize, F: Fn(&T::View) -> R + Send + Sync + 'static> Format<T> for Csv<F> {
    fn line(&self, record: &T::View, out: &mut Vec<u8>) -> Result<(), String> {
        let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(out);
        writer
            .serialize((self.0)(record))
            .map_err(|error| format!("cannot write as CSV: {error}"))?;
        writer.flush().map_err(|error| format!("cannot write as CSV: {error}"))
    }
}

/// JSON lines of what a closure makes of a record.
#[derive(Debug)]
pub struct Json<F>(pub F);

impl<T: Record, R: Serialize, F: Fn(&T::View) -> R + Send + Sync + 'static> Format<T> for Json<F> {
    fn line(&self, record: &T::View, out: &mut Vec<u8>) -> Result<(), String> {
        serde_json::to_writer(&mut *out, &(self.0)(record))
            .map_err(|error| format!("cannot write as JSON: {error}"))?;
        out.push(b'\n');
        Ok(())
    }
}

/// Lines of text, one for each record.
#[derive(Debug)]
pub struct Lines<F>(pub F);

impl<T: Record, R: std::fmt::Display, F: Fn(&T::View) -> R + Send + Sync + 'static> Format<T>
    for Lines<F>
{
    fn line(&self, record: &T::View, out: &mut Vec<u8>) -> Result<(), String> {
        writeln!(out, "{}", (self.0)(record)).map_err(|error| error.to_string())
    }
}

/// A file or a folder of parts.
///
/// ```
/// use testudo::sink::file::{Csv, FileSink};
/// let to_file = FileSink::new("out.csv", Csv(|n: &u64| (*n, n * n))).header("n,square");
/// ```
///
/// What is in a folder under a name that does not end in `.open` is finished, and may be taken by
/// readers while the job runs:
///
/// ```
/// # use testudo::sink::file::{Csv, FileSink};
/// // out/part-000-000000.csv and so on, from a job with --checkpoint-dir and --part-bytes 64MiB
/// let to_folder = FileSink::folder("out", "csv", Csv(|n: &u64| (*n, n * n)));
/// ```
#[derive(Debug)]
pub struct FileSink<F> {
    path: PathBuf,
    is_folder: bool,
    header: Option<String>,
    extension: String,
    format: Arc<F>,
    /// Bytes beyond which a cut closes a part; `None` where there are no cuts.
    part_bytes: Option<u64>,
}

impl<F> FileSink<F> {
    /// Writes to the file `path`.
    pub fn new(path: impl Into<PathBuf>, format: F) -> Self {
        let format = Arc::new(format);
        let (path, extension) = (path.into(), String::new());
        Self { path, is_folder: false, header: None, extension, format, part_bytes: None }
    }

    /// Writes to the folder `path`. Without checkpoints: `part-000.EXTENSION` and so on, one for
    /// each subtask, named so when the job has ended well. With checkpoints: any number of parts
    /// `part-000-000000.EXTENSION` of about `--part-bytes`, each named so once a complete
    /// checkpoint holds it. Until then the name ends in `.open`.
    pub fn folder(path: impl Into<PathBuf>, extension: &str, format: F) -> Self {
        let extension = extension.trim_start_matches('.').into();
        Self { is_folder: true, extension, ..Self::new(path, format) }
    }

    /// Begins each file with this line.
    #[must_use]
    pub fn header(mut self, line: &str) -> Self {
        self.header = Some(line.into());
        self
    }

    /// Where a subtask's parts are, if cuts end them.
    fn shelf(&self, subtask: usize) -> Option<Shelf> {
        let part_bytes = self.part_bytes.filter(|_| self.is_folder)?;
        let (folder, extension) = (self.path.clone(), self.extension.clone());
        Some(Shelf { folder, extension, subtask, header: self.header.clone(), part_bytes })
    }
}

/// Writes one file, or the parts of one subtask.
#[derive(Debug)]
pub struct FileWriter<F> {
    to: To,
    /// The lines of the open step.
    lines: Vec<u8>,
    format: Arc<F>,
    /// The last error, if it may pass.
    outage: Option<i32>,
}

impl<F> FileWriter<F> {
    fn new(to: To, format: Arc<F>) -> Self {
        Self { to, lines: Vec::new(), format, outage: None }
    }

    /// Notes whether an error may pass.
    fn noted(&mut self, done: Result<(), Refusal>) -> Result<(), String> {
        done.map_err(|refusal| {
            self.outage = refusal.outage;
            refusal.message
        })
    }

    fn put(&mut self, lines: &[u8], position: &mut Written) -> Result<(), String> {
        let done = match &mut self.to {
            To::One(file, _) => file.try_append(lines, &mut position.bytes),
            To::Parts(parts) => parts.append(lines, position),
        };
        self.noted(done)
    }
}

#[derive(Debug)]
enum To {
    One(AppendFile, SharedFiles),
    Parts(Parts),
}

/// How far a file is written.
#[derive(
    Debug,
    Clone,
    Copy,
    testudo_shm::zerocopy::FromBytes,
    testudo_shm::zerocopy::IntoBytes,
    testudo_shm::zerocopy::Immutable,
)]
#[zerocopy(crate = "testudo_shm::zerocopy")]
#[repr(C)]
pub struct Written {
    /// Bytes that are complete.
    pub bytes: u64,
    /// The number of the part that they are in.
    pub part: u64,
}

impl<T: Record, F: Format<T>> Sink<T> for FileSink<F> {
    type Position = Written;
    type Writer = FileWriter<F>;

    fn configure(&mut self, settings: &Settings) {
        self.part_bytes = settings.checkpoint_dir.is_some().then_some(settings.part_bytes);
    }

    fn start(&self, subtask: Subtask) -> Written {
        if self.shelf(subtask.index).is_some() {
            return Written { bytes: 0, part: 0 };
        }
        // The launching process has written the header.
        let bytes = self.header.as_ref().map_or(0, |header| header.len() as u64 + 1);
        Written { bytes, part: 0 }
    }

    /// Parts of before have lower numbers: a part is numbered after a cut of its own run.
    fn join(&self, subtask: Subtask, epoch: u64) -> Written {
        match self.shelf(subtask.index) {
            Some(_) => Written { bytes: 0, part: epoch },
            None => Sink::<T>::start(self, subtask),
        }
    }

    fn open(&self, subtask: Subtask, from: &Written) -> Result<FileWriter<F>, String> {
        let format = Arc::clone(&self.format);
        if let Some(shelf) = self.shelf(subtask.index) {
            return Ok(FileWriter::new(To::Parts(Parts::open(shelf, from)?), format));
        }
        let path = if self.is_folder {
            let name = parts::name(subtask.index, None, &self.extension);
            self.path.join(name + parts::OPEN)
        } else {
            self.path.clone()
        };
        let file = AppendFile::open(&path, from.bytes)?;
        let files = Rc::new(RefCell::new(vec![file.handle()?]));
        Ok(FileWriter::new(To::One(file, files), format))
    }

    /// That there are as many bytes: nobody reads them again.
    fn check(&self, subtask: Subtask, position: &Written) -> Result<(), String> {
        if position.bytes == 0 {
            return Ok(());
        }
        let (path, found) = match self.shelf(subtask.index) {
            Some(shelf) => parts::bytes_of(&shelf, position.part),
            None => {
                let meta = std::fs::metadata(&self.path);
                if meta.as_ref().is_ok_and(|meta| !meta.is_file()) {
                    return Ok(());
                }
                (self.path.clone(), meta.ok().map(|meta| meta.len()))
            }
        };
        let (path, written) = (path.display(), position.bytes);
        match found {
            None => Err(format!("output {path}, of which {written} bytes were written, is gone")),
            Some(found) if found < written => Err(format!(
                "output {path} has {found} bytes where {written} were written: it was changed from \
                 outside"
            )),
            Some(_) => Ok(()),
        }
    }

    fn settle(&self, subtask: Subtask, position: &Written, epoch: u64) -> Result<(), String> {
        match self.shelf(subtask.index) {
            Some(shelf) if self.path.exists() => Parts::open(shelf, position)?.end(epoch),
            // A file has one writer, which takes back what is beyond its position.
            _ => Ok(()),
        }
    }

    fn withdraw(&self, from: usize, epoch: u64) -> Result<(), String> {
        if self.shelf(0).is_none() {
            return Ok(());
        }
        let all = parts::list(&self.path, &self.extension)?.into_iter();
        let mut beyond = all.filter(|part| part.subtask >= from && part.number >= epoch);
        beyond.try_for_each(|part| parts::remove(&part.path))
    }

    fn parallelism(&self) -> Option<usize> {
        (!self.is_folder).then_some(1)
    }

    fn claims(&self) -> Option<Output> {
        Some(Output {
            path: self.path.clone(),
            parts: self.is_folder.then(|| self.extension.clone()),
            header: self.header.clone(),
        })
    }
}

impl<T: Record, F: Format<T>> Writer<T, Written> for FileWriter<F> {
    fn write(&mut self, record: &T::View) -> Result<(), String> {
        self.format.line(record, &mut self.lines)
    }

    fn flush(&mut self, position: &mut Written) -> Result<(), String> {
        let lines = std::mem::take(&mut self.lines);
        let done = self.put(&lines, position);
        self.lines = lines;
        if done.is_ok() {
            self.lines.clear();
        }
        done
    }

    fn outage(&self) -> Option<i32> {
        self.outage
    }

    fn retain(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.lines)
    }

    fn retry(&mut self, retained: &[u8], position: &mut Written) -> Result<(), String> {
        self.put(retained, position)
    }

    fn files(&self) -> Option<SharedFiles> {
        match &self.to {
            To::One(_, files) => Some(Rc::clone(files)),
            To::Parts(parts) => Some(parts.files()),
        }
    }

    fn prepare(&mut self, cut: Cut, position: &mut Written) -> Result<(), String> {
        if let To::Parts(parts) = &mut self.to {
            parts.close(cut.epoch, cut.is_last, position);
        }
        Ok(())
    }

    fn commit(&mut self, epoch: u64) -> Result<(), String> {
        match &mut self.to {
            To::One(..) => Ok(()),
            To::Parts(parts) => {
                let done = parts.commit(epoch);
                self.noted(done)
            }
        }
    }
}
