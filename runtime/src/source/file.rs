//! File sources: CSV, JSON lines, plain lines.
//!
//! Files are read in the given order. The launching process measures them once; each is cut into
//! contiguous byte ranges, one per subtask, at line ends. A reader's position is its range and the
//! offset in that file, so a successor goes on with the very next record. A bad line is refused
//! with its file, offset and reason; reading goes on behind it.
//!
//! A file that is cut short, removed or replaced while the job reads it costs what is gone, and no
//! more: that is counted as one refused input that says how much it was.
//!
//! `split` cuts, `points` finds where, `lines` reads, `csv` and `json` decode, `rejects` describes
//! what was refused.

mod columns;

mod csv;

mod json;

mod lines;

mod points;

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
    decoder.check_header::<T>()?;
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

/// Records on which a header is tried.
const TRIED: usize = 100;

impl<T: Record> FileSource<T> {
    /// Tries the header on the type, and on the first records: where it lacks a column that the
    /// job needs, every line of every file would be refused, so the job does not begin.
    fn check_header(&self, inputs: &[InputFile], framing: &Framing) -> Result<(), String> {
        let text = |error: lines::InputError| error.to_string();
        let Some(header) = split::header(inputs, framing).map_err(text)? else {
            return Ok(());
        };
        let ranges = split::split(inputs, framing, 1, self.cut()).map_err(text)?.swap_remove(0);
        let first = ranges.first();
        let file =
            first.map_or_else(|| inputs.iter().position(|input| input.end > 0), |r| Some(r.file));
        let path = &inputs[file.unwrap_or_default()].path;
        let named = |why: String| format!("input file {}: {why}", path.display());
        let mut decode = (self.make)(self.form, Some(&header)).map_err(named)?;
        let Some(range) = first else { return Ok(()) };
        let mut reader = LineReader::open(path, range.bytes.clone(), *framing).map_err(text)?;
        for _ in 0..TRIED {
            match reader.next().map_err(text)? {
                None => break,
                Some(Next::Reject { .. }) => {}
                Some(Next::Line { text, .. }) => match decode(text) {
                    Err(why) if csv::lacks_column(&why) => return Err(named(why)),
                    _ => {}
                },
            }
        }
        Ok(())
    }
}

/// Reads one subtask's ranges.
pub struct FileReader<T> {
    files: Vec<InputFile>,
    ranges: VecDeque<ByteRange>,
    /// Index of the first range in `ranges` among all of this subtask.
    range: u64,
    /// Where in it the reader begins that is not open yet; 0 for its start.
    offset: u64,
    /// Tries in a row that an outage has foiled.
    tries: u32,
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
        self.check_header(&inputs, &framing)?;
        if let Some(records) = wishes.limit {
            inputs = split::limit(&inputs, &framing, records).map_err(|error| error.to_string())?;
        }
        let found: Vec<(u64, lines::Identity)> =
            inputs.iter().map(|input| (input.end, input.identity)).collect();
        serde_json::to_string(&found).map_err(|error| error.to_string())
    }

    fn configure(&mut self, survey: &str, wishes: &Wishes) -> Result<bool, String> {
        let found: Vec<(u64, lines::Identity)> =
            serde_json::from_str(survey).map_err(|error| error.to_string())?;
        let files = self.paths.iter().zip(found);
        let input = |(path, (end, identity)): (&PathBuf, _)| InputFile {
            path: path.clone(),
            end,
            identity,
        };
        self.inputs = files.map(input).collect();
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
        let ranges: VecDeque<ByteRange> = own.into_iter().skip(from[0] as usize).collect();
        Ok(FileReader {
            files: self.inputs.clone(),
            range: from[0],
            offset: from[1],
            tries: 0,
            reader: None,
            framing,
            decode: (self.make)(self.form, header.as_deref())?,
            of: PhantomData,
            ranges,
        })
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.paths.clone()
    }

    fn may_reject(&self) -> bool {
        true
    }
}

/// Pauses after tries that an outage has foiled: the first, doubled each time, and the longest.
const PAUSE_NS: u64 = 5_000_000;
const PAUSE_MAX_NS: u64 = 1_000_000_000;

impl<T> FileReader<T> {
    /// Opens the first range that is left, if none is open; false when there is none.
    fn open_range(&mut self) -> Result<bool, lines::InputError> {
        if self.reader.is_none() {
            let Some(range) = self.ranges.front() else {
                return Ok(false);
            };
            let (bytes, input): (Range<u64>, _) = (range.bytes.clone(), &self.files[range.file]);
            let (file, _) = lines::open_known(&input.path, input.identity)?;
            let mut reader = LineReader::over(file, &input.path, bytes, self.framing);
            if self.offset > 0 {
                reader.seek(self.offset)?;
            }
            self.reader = Some(reader);
        }
        Ok(true)
    }

    /// The next range is the first that is left.
    fn end_range(&mut self) -> [u64; 2] {
        self.reader = None;
        self.ranges.pop_front();
        (self.range, self.offset) = (self.range + 1, 0);
        [self.range, 0]
    }

    /// What is left of a range cannot be read: when to try again, or what is lost.
    #[cold]
    fn failed(&mut self, error: &lines::InputError) -> Result<Failed, String> {
        if let Some(errno) = error.outage() {
            let pause = (PAUSE_NS << self.tries.min(16)).min(PAUSE_MAX_NS);
            self.tries += 1;
            let until_ns = crate::time::now_ns() + pause;
            return Ok(Failed::Later(Progress::Blocked { until_ns, errno }));
        }
        let (Some(range), true) = (self.ranges.front(), error.is_loss()) else {
            return Err(error.to_string());
        };
        let at = self.reader.as_ref().map_or(self.offset, LineReader::position);
        let at = at.max(range.bytes.start);
        let lost = range.bytes.end.saturating_sub(at);
        let file = &self.files[range.file].path;
        crate::say!("testudo: {error}; {lost} bytes are lost, the job goes on");
        let reason = format!("{error}; {lost} bytes are lost");
        let description = refused(file, at, &reason, b"", 0);
        Ok(Failed::Lost(description))
    }
}

/// What becomes of a range that cannot be read on.
enum Failed {
    Later(Progress),
    Lost(String),
}

impl<T: Record> FileReader<T> {
    /// Reads one record or reject; `None` when the range was read or given up, and when there is
    /// nothing left.
    fn read_one(
        &mut self,
        position: &mut [u64; 2],
        out: &mut impl Collect<T>,
    ) -> Result<Option<Progress>, lines::InputError> {
        if !self.open_range()? {
            return Ok(Some(Progress::End));
        }
        let (Some(reader), Some(range)) = (&mut self.reader, self.ranges.front()) else {
            return Ok(Some(Progress::End));
        };
        let file: &Path = &self.files[range.file].path;
        match reader.next()? {
            Some(Next::Line { offset, text }) => match (self.decode)(text) {
                Ok(record) => out.emit(record),
                Err(reason) => out.reject(refused(file, offset, &reason, text, text.len() as u64)),
            },
            Some(Next::Reject { offset, head, bytes, reason }) => {
                out.reject(refused(file, offset, &reason.to_string(), head, bytes));
            }
            None => {
                *position = self.end_range();
                return Ok(None);
            }
        }
        self.offset = reader.position();
        *position = [self.range, self.offset];
        Ok(None)
    }
}

impl<T: Record> Reader<T, [u64; 2]> for FileReader<T> {
    fn read(
        &mut self,
        position: &mut [u64; 2],
        max: usize,
        out: &mut impl Collect<T>,
    ) -> Result<Progress, String> {
        for _ in 0..max.min(LINES) {
            match self.read_one(position, out) {
                Ok(None) => self.tries = 0,
                Ok(Some(progress)) => return Ok(progress),
                Err(error) => match self.failed(&error)? {
                    Failed::Later(progress) => {
                        // Opened again by the next try, where this one stood.
                        self.reader = None;
                        return Ok(progress);
                    }
                    Failed::Lost(description) => {
                        out.reject(description);
                        *position = self.end_range();
                    }
                },
            }
        }
        Ok(Progress::More)
    }

    fn skip(&mut self, position: &mut [u64; 2]) -> Result<Option<Vec<u8>>, String> {
        let text = |error: lines::InputError| error.to_string();
        while self.open_range().map_err(text)? {
            let Some(reader) = &mut self.reader else { break };
            let line = match reader.next().map_err(text)? {
                Some(Next::Line { text, .. }) => text.to_vec(),
                Some(Next::Reject { head, .. }) => head.to_vec(),
                None => {
                    self.reader = None;
                    self.ranges.pop_front();
                    self.range += 1;
                    *position = [self.range, 0];
                    continue;
                }
            };
            *position = [self.range, reader.position()];
            return Ok(Some(line));
        }
        Ok(Some(Vec::new()))
    }

    fn origin(&self, position: &[u64; 2]) -> String {
        let range = self.ranges.get((position[0].saturating_sub(self.range)) as usize);
        let file =
            range.map_or(String::new(), |range| self.files[range.file].path.display().to_string());
        let start = range.map_or(0, |range| range.bytes.start);
        format!("{file} at byte {}", if position[1] > 0 { position[1] } else { start })
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
