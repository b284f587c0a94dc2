//! File sources: CSV, JSON lines, plain lines.
//!
//! Files are read in the given order. The launching process measures them once; each is cut into
//! contiguous byte ranges, one per subtask, at line ends. A reader's position is its range and the
//! offset in that file, so a successor goes on with the very next record. A bad line is refused
//! with its file, offset and reason; reading goes on behind it.
//!
//! `split` cuts, `lines` reads, `csv` and `json` decode, `rejects` describes what was refused.

mod csv;

mod json;

mod lines;

mod rejects;

mod split;

use super::{Collect, Progress, Reader, Source, Subtask, Wishes};
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};
use testudo_shm::record::Record;

use self::csv::{CsvDecoder, Dialect};
use self::lines::{Framing, LineReader, Next};
use self::split::{ByteRange, Cut, InputFile};

/// Records decoded at most before the step looks at its room again; lines are dear compared with
/// that look.
const LINES: usize = 512;

/// How the bytes of a file become records.
#[derive(Debug, Clone, Copy)]
enum Form {
    Csv { dialect: Dialect, header: bool },
    Json,
    Lines,
}

/// Files of records.
///
/// ```
/// use testudo::source::file::FileSource;
/// let rows: FileSource<Vec<String>> = FileSource::csv(["in.csv"]);
/// let lines: FileSource<String> = FileSource::lines(["text.txt"]);
/// ```
pub struct FileSource<T> {
    paths: Vec<PathBuf>,
    form: Form,
    keep_whole: bool,
    inputs: Vec<InputFile>,
    make: fn(Form, Option<&[u8]>) -> Result<Decoder<T>, String>,
}

impl<T> std::fmt::Debug for FileSource<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileSource({:?}, {:?})", self.form, self.paths)
    }
}

/// Decodes one line.
type Decoder<T> = Box<dyn FnMut(&[u8]) -> Result<T, String>>;

fn paths<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Vec<PathBuf> {
    paths.into_iter().map(Into::into).collect()
}

impl<T: Record + DeserializeOwned> FileSource<T> {
    /// CSV files whose first line names the fields of `T`.
    #[must_use]
    pub fn csv<P: Into<PathBuf>>(files: impl IntoIterator<Item = P>) -> Self {
        let form = Form::Csv { dialect: Dialect::default(), header: true };
        Self { paths: paths(files), form, keep_whole: false, inputs: Vec::new(), make: csv_decoder }
    }

    /// Files with one JSON value on each line.
    #[must_use]
    pub fn json<P: Into<PathBuf>>(files: impl IntoIterator<Item = P>) -> Self {
        let make = |_: Form, _: Option<&[u8]>| {
            Ok(Box::new(|line: &[u8]| json::decode::<T>(line)) as Decoder<T>)
        };
        Self { paths: paths(files), form: Form::Json, keep_whole: false, inputs: Vec::new(), make }
    }

    /// Sets the delimiter of CSV fields (a comma otherwise).
    #[must_use]
    pub fn delimiter(mut self, delimiter: u8) -> Self {
        if let Form::Csv { dialect, .. } = &mut self.form {
            dialect.delimiter = delimiter;
        }
        self
    }

    /// CSV without a first line of names: fields are taken in order.
    #[must_use]
    pub fn headless(mut self) -> Self {
        if let Form::Csv { header, .. } = &mut self.form {
            *header = false;
        }
        self
    }
}

fn csv_decoder<T: DeserializeOwned + 'static>(
    form: Form,
    header: Option<&[u8]>,
) -> Result<Decoder<T>, String> {
    let dialect = match form {
        Form::Csv { dialect, .. } => dialect,
        _ => Dialect::default(),
    };
    let mut decoder = CsvDecoder::new(dialect, header)?;
    Ok(Box::new(move |line| decoder.decode::<T>(line)))
}

impl FileSource<String> {
    /// The lines of text files; bytes that are no UTF-8 are refused.
    #[must_use]
    pub fn lines<P: Into<PathBuf>>(files: impl IntoIterator<Item = P>) -> Self {
        let make = |_: Form, _: Option<&[u8]>| {
            let decode = |line: &[u8]| {
                let text = std::str::from_utf8(line).map_err(|error| error.to_string())?;
                Ok(text.to_owned())
            };
            Ok(Box::new(decode) as Decoder<String>)
        };
        Self { paths: paths(files), form: Form::Lines, keep_whole: false, inputs: Vec::new(), make }
    }
}

impl<T> FileSource<T> {
    fn framing(&self) -> Framing {
        match self.form {
            Form::Csv { dialect, header } => match dialect.quoting() {
                Some(quoting) if self.keep_whole => Framing::quoted_csv(header, quoting),
                _ => Framing::csv(header),
            },
            Form::Json => Framing::json(),
            Form::Lines => Framing::text(),
        }
    }

    fn cut(&self) -> Cut {
        if self.keep_whole { Cut::WholeFiles } else { Cut::AtLines }
    }
}

/// Reads one subtask's ranges.
pub struct FileReader<T> {
    files: Vec<PathBuf>,
    ranges: VecDeque<ByteRange>,
    /// Index of the first range in `ranges` among all of this subtask.
    range: u64,
    reader: Option<LineReader>,
    framing: Framing,
    decode: Decoder<T>,
    of: PhantomData<T>,
}

impl<T> std::fmt::Debug for FileReader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileReader(range {}, {} left)", self.range, self.ranges.len())
    }
}

impl<T: Record> Source for FileSource<T> {
    type Out = T;
    /// Which of the subtask's ranges, and the offset in its file (0 for the range's start).
    type Position = [u64; 2];
    type Reader = FileReader<T>;

    fn start(&self, _subtask: Subtask) -> [u64; 2] {
        [0, 0]
    }

    fn survey(&self, wishes: &Wishes) -> Result<String, String> {
        if self.paths.is_empty() {
            return Err("no input file given".into());
        }
        let mut inputs = Vec::new();
        for path in &self.paths {
            inputs.push(InputFile::measure(path).map_err(|error| error.to_string())?);
        }
        let framing =
            Self { keep_whole: wishes.keep_whole, inputs: Vec::new(), paths: Vec::new(), ..*self }
                .framing();
        if let Some(records) = wishes.limit {
            inputs = split::limit(&inputs, &framing, records).map_err(|error| error.to_string())?;
        }
        let ends: Vec<u64> = inputs.iter().map(|input| input.end).collect();
        serde_json::to_string(&ends).map_err(|error| error.to_string())
    }

    fn configure(&mut self, survey: &str, wishes: &Wishes) -> Result<bool, String> {
        let ends: Vec<u64> = serde_json::from_str(survey).map_err(|error| error.to_string())?;
        let files = self.paths.iter().zip(ends);
        self.inputs = files.map(|(path, end)| InputFile { path: path.clone(), end }).collect();
        self.keep_whole = wishes.keep_whole;
        Ok(true)
    }

    fn open(&self, subtask: Subtask, from: &[u64; 2]) -> Result<FileReader<T>, String> {
        let framing = self.framing();
        let text = |error: lines::InputError| error.to_string();
        let header = split::header(&self.inputs, &framing).map_err(text)?;
        let mut ranges =
            split::split(&self.inputs, &framing, subtask.count, self.cut()).map_err(text)?;
        let own = ranges.swap_remove(subtask.index);
        let mut ranges: VecDeque<ByteRange> = own.into_iter().skip(from[0] as usize).collect();
        let mut reader = FileReader {
            files: self.inputs.iter().map(|input| input.path.clone()).collect(),
            range: from[0],
            reader: None,
            framing,
            decode: (self.make)(self.form, header.as_deref())?,
            of: PhantomData,
            ranges: std::mem::take(&mut ranges),
        };
        if from[1] > 0 {
            reader.open_range().map_err(text)?;
            if let Some(lines) = &mut reader.reader {
                lines.seek(from[1]).map_err(text)?;
            }
        }
        Ok(reader)
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.paths.clone()
    }

    fn may_reject(&self) -> bool {
        true
    }
}

impl<T> FileReader<T> {
    /// Opens the first range that is left, if none is open; false when there is none.
    fn open_range(&mut self) -> Result<bool, lines::InputError> {
        if self.reader.is_none() {
            let Some(range) = self.ranges.front() else {
                return Ok(false);
            };
            let bytes: Range<u64> = range.bytes.clone();
            self.reader = Some(LineReader::open(&self.files[range.file], bytes, self.framing)?);
        }
        Ok(true)
    }
}

impl<T: Record> Reader<T, [u64; 2]> for FileReader<T> {
    fn read(
        &mut self,
        position: &mut [u64; 2],
        max: usize,
        out: &mut impl Collect<T>,
    ) -> Result<Progress, String> {
        let text = |error: lines::InputError| error.to_string();
        for _ in 0..max.min(LINES) {
            if !self.open_range().map_err(text)? {
                return Ok(Progress::End);
            }
            let (Some(reader), Some(range)) = (&mut self.reader, self.ranges.front()) else {
                return Ok(Progress::End);
            };
            let file: &Path = &self.files[range.file];
            match reader.next().map_err(text)? {
                Some(Next::Line { offset, text }) => match (self.decode)(text) {
                    Ok(record) => out.emit(record),
                    Err(reason) => {
                        out.reject(refused(file, offset, &reason, text, text.len() as u64))
                    }
                },
                Some(Next::Reject { offset, head, bytes, reason }) => {
                    out.reject(refused(file, offset, &reason.to_string(), head, bytes));
                }
                None => {
                    self.reader = None;
                    self.ranges.pop_front();
                    self.range += 1;
                    *position = [self.range, 0];
                    continue;
                }
            }
            *position = [self.range, reader.position()];
        }
        Ok(Progress::More)
    }
}

fn refused(file: &Path, offset: u64, reason: &str, line: &[u8], bytes: u64) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut out = Vec::new();
    rejects::append(&mut out, file.as_os_str().as_bytes(), offset, reason, line, bytes);
    if out.last() == Some(&b'\n') {
        out.pop();
    }
    String::from_utf8_lossy(&out).into_owned()
}
