//! File sinks: CSV, JSON lines, or any text; to one file (parallelism 1) or to a folder (a part for
//! each subtask).
//!
//! An existing output is overwritten: the launching process truncates it, and removes old parts,
//! before workers start. Exact across kills through [`AppendFile`].
//!
//! Called through [`Sink`].

use super::append::AppendFile;
use super::{Sink, Writer};
use crate::plan::Output;
use crate::source::Subtask;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
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
#[derive(Debug)]
pub struct FileSink<F> {
    path: PathBuf,
    is_folder: bool,
    header: Option<String>,
    extension: String,
    format: Arc<F>,
}

impl<F> FileSink<F> {
    /// Writes to the file `path`.
    pub fn new(path: impl Into<PathBuf>, format: F) -> Self {
        let path = path.into();
        Self {
            path,
            is_folder: false,
            header: None,
            extension: String::new(),
            format: Arc::new(format),
        }
    }

    /// Writes to the folder `path`: `part-000.EXTENSION` and so on, one for each subtask.
    pub fn folder(path: impl Into<PathBuf>, extension: &str, format: F) -> Self {
        let extension = extension.trim_start_matches('.').into();
        Self {
            path: path.into(),
            is_folder: true,
            header: None,
            extension,
            format: Arc::new(format),
        }
    }

    /// Begins each file with this line.
    #[must_use]
    pub fn header(mut self, line: &str) -> Self {
        self.header = Some(line.into());
        self
    }
}

/// Writes one file.
#[derive(Debug)]
pub struct FileWriter<F> {
    file: AppendFile,
    format: Arc<F>,
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
}

impl<T: Record, F: Format<T>> Sink<T> for FileSink<F> {
    type Position = Written;
    type Writer = FileWriter<F>;

    fn start(&self, _subtask: Subtask) -> Written {
        // The launching process has written the header.
        Written { bytes: self.header.as_ref().map_or(0, |header| header.len() as u64 + 1) }
    }

    fn open(&self, subtask: Subtask, from: &Written) -> Result<FileWriter<F>, String> {
        let path = if self.is_folder {
            self.path.join(crate::supervisor::outputs::part_name(subtask.index, &self.extension))
        } else {
            self.path.clone()
        };
        let file = AppendFile::open(&path, from.bytes)?;
        Ok(FileWriter { file, format: Arc::clone(&self.format) })
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
        self.format.line(record, self.file.buffer())
    }

    fn flush(&mut self, position: &mut Written) -> Result<(), String> {
        self.file.flush(&mut position.bytes)
    }

    fn file(&self) -> Option<crate::worker::context::SharedFile> {
        Some(self.file.file())
    }
}
