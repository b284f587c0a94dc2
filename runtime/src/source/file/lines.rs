//! Lines and quoted records of one byte range of a file, read in blocks into private memory.
//!
//! A file is read with `pread`, not mapped: a mapped file that another program cuts short kills
//! its reader with SIGBUS in the middle of a step; here the same thing is an [`InputError`], which
//! comes after the last whole record that is left.
//!
//! Invariants:
//! - [`LineReader::position`] is always the offset of the next record. It is all that a cell has to
//!   hold: a reader that seeks there yields what this one would have yielded (R13);
//! - what a record is depends on the file's bytes and the [`Framing`] alone, never on how blocks
//!   fall or where reading resumed;
//! - no byte outside the range is read, and no record costs an allocation (rejects excepted);
//! - the buffer never holds more than the longest allowed record and two blocks.
//!
//! Called by the file source once per record; [`super::split`] makes the ranges.

use memchr::{memchr, memchr2};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes asked of the kernel at once: enough to hide the call, few enough to stay in L2.
pub const BLOCK: usize = 256 * 1024;

/// The default for [`Framing::max_bytes`].
pub const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Bytes of an unreadable record that are kept to show it: one more than a rejects file takes,
/// which tells it whether it may cut there.
pub const HEAD: usize = super::rejects::LINE_CAP + 1;

/// The UTF-8 mark that some editors put at a file's start; never part of a record.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Where the records of a file begin and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// Each file starts with a header: the same in all files of one source, not a record.
    pub header: bool,
    /// Empty lines are not records.
    pub skip_blank: bool,
    /// Line ends within quotes belong to the record (`--no-split`). `None`: every line end ends it.
    pub quoting: Option<Quoting>,
    /// A longer record, without its line end, is a reject.
    pub max_bytes: usize,
}

/// How a record holds line ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quoting {
    /// Opens a field at its first byte, closes it, and stands for itself when doubled inside.
    pub quote: u8,
    /// Ends a field.
    pub delimiter: u8,
}

impl Framing {
    /// Text: every line is a record, an empty one too.
    #[must_use]
    pub const fn text() -> Self {
        Self { header: false, skip_blank: false, quoting: None, max_bytes: MAX_BYTES }
    }

    /// JSON lines: as text, without the empty ones.
    #[must_use]
    pub const fn json() -> Self {
        Self { skip_blank: true, ..Self::text() }
    }

    /// CSV with one record per line.
    #[must_use]
    pub const fn csv(header: bool) -> Self {
        Self { header, ..Self::json() }
    }

    /// CSV whose quoted fields may hold line ends.
    #[must_use]
    pub const fn quoted_csv(header: bool, quoting: Quoting) -> Self {
        Self { quoting: Some(quoting), ..Self::csv(header) }
    }
}

/// What is wrong with an input file.
#[derive(Debug)]
#[non_exhaustive]
pub enum InputError {
    /// A system call failed.
    System {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder, a pipe or a device: it has no offsets to come back to.
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// Another file has the name of the one that the job measured, or none has.
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The file became shorter than it was when the job measured it.
    Shrunk {
        /// The file.
        path: PathBuf,
        /// Bytes that the job has to read.
        planned: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// A file's header differs from that of the first file.
    Header {
        /// The file.
        path: PathBuf,
        /// Its header.
        found: String,
        /// The first file with a header.
        first: PathBuf,
        /// That one's header.
        expected: String,
    },
    /// The header is not a whole record: too long, or with a quote that stays open.
    HeaderRecord {
        /// The file.
        path: PathBuf,
        /// Why it is none.
        reason: RejectReason,
    },
    /// An offset to resume from that does not lie in the range.
    Offset {
        /// The file.
        path: PathBuf,
        /// The offset asked for.
        offset: u64,
        /// The range being read.
        range: Range<u64>,
    },
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { doing, path, source } => {
                write!(f, "cannot {doing} input file {}: {source}", path.display())
            }
            Self::NotAFile { path } => write!(
                f,
                "input {} is not a regular file; a file source resumes at offsets, so copy the \
                 data to a file or use a source for streams",
                path.display()
            ),
            Self::Replaced { path } => write!(
                f,
                "input file {} was removed, or replaced by another one, while the job read it",
                path.display()
            ),
            Self::Shrunk { path, planned, found } => write!(
                f,
                "input file {} has {found} bytes, but {planned} when the job started: it was cut \
                 short while the job read it",
                path.display()
            ),
            Self::Header { path, found, first, expected } => write!(
                f,
                "input file {} starts with {found:?}, but {} with {expected:?}; all files of a \
                 source need the same header",
                path.display(),
                first.display()
            ),
            Self::HeaderRecord { path, reason } => {
                write!(f, "input file {} has no usable header: {reason}", path.display())
            }
            Self::Offset { path, offset, range } => write!(
                f,
                "cannot resume input file {} at {offset}: this subtask reads bytes {} to {}; were \
                 other files or another parallelism given than before?",
                path.display(),
                range.start,
                range.end
            ),
        }
    }
}

impl std::error::Error for InputError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl InputError {
    /// What is missing is gone for good, as far as the job can know.
    pub(super) fn is_loss(&self) -> bool {
        matches!(self, Self::Replaced { .. } | Self::Shrunk { .. })
    }

    /// The operating system's number of an error that may pass by itself.
    pub(super) fn outage(&self) -> Option<i32> {
        let Self::System { source, .. } = self else { return None };
        source.raw_os_error().filter(|errno| crate::worker::outside::may_pass(*errno))
    }
}

/// What tells a file from any other that may have its name later.
pub(super) type Identity = (u64, u64);

/// The identity of an open file.
pub(super) fn identity(file: &File) -> io::Result<Identity> {
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

/// Opens the file that was measured; `Replaced` if it is not there any more.
pub(super) fn open_known(path: &Path, known: Identity) -> Result<(File, u64), InputError> {
    let replaced = || InputError::Replaced { path: path.into() };
    match open(path) {
        Ok((file, size)) if identity(&file).ok() == Some(known) => Ok((file, size)),
        Ok(_) | Err(InputError::NotAFile { .. }) => Err(replaced()),
        Err(InputError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(replaced())
        }
        Err(error) => Err(error),
    }
}

/// Opens a regular file for reading: the file and its size.
pub(super) fn open(path: &Path) -> Result<(File, u64), InputError> {
    let failed = |doing| move |source| InputError::System { doing, path: path.into(), source };
    // Opening a pipe without a writer would block for ever, so its kind is asked first.
    if !std::fs::metadata(path).map_err(failed("open"))?.is_file() {
        return Err(InputError::NotAFile { path: path.into() });
    }
    let file = File::open(path).map_err(failed("open"))?;
    let size = file.metadata().map_err(failed("measure"))?.len();
    Ok((file, size))
}

/// Why bytes of a file are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RejectReason {
    /// Longer than [`Framing::max_bytes`].
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A quote is open where the file ends.
    OpenQuote,
    /// A quoted record does not end within [`Framing::max_bytes`], though its first line does.
    LongQuote {
        /// The limit.
        limit: usize,
    },
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { limit } => write!(f, "the line is longer than {limit} bytes"),
            Self::OpenQuote => {
                write!(f, "a quote that opens on this line is not closed before the file's end")
            }
            Self::LongQuote { limit } => {
                write!(f, "the record with its quoted lines is longer than {limit} bytes")
            }
        }
    }
}

/// What a reader found at its position.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// A record.
    Line {
        /// Where it starts in the file.
        offset: u64,
        /// Its bytes, without `\n` or `\r\n`.
        text: &'a [u8],
    },
    /// A line that is no record; reading goes on after the first line end behind `offset`, so
    /// that a stray quote costs one line, not the rest of the file.
    Reject {
        /// Where it starts in the file.
        offset: u64,
        /// Its first bytes, at most [`HEAD`].
        head: &'a [u8],
        /// How long it is.
        bytes: u64,
        /// Why it is no record.
        reason: RejectReason,
    },
}

/// Finds the end of one record, in as many pieces as it comes.
#[derive(Debug)]
pub(super) struct Scanner {
    quoting: Option<Quoting>,
    place: Place,
}

/// Where in a record a scanner stands; the same automaton as the CSV decoder's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    FieldStart,
    Plain,
    Quoted,
    AfterQuote,
}

impl Scanner {
    /// At the start of a record.
    pub(super) fn new(quoting: Option<Quoting>) -> Self {
        Self { quoting, place: Place::FieldStart }
    }

    /// The index in `bytes`, which follow those of the last call, of the `\n` that ends the record.
    pub(super) fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        let Some(Quoting { quote, delimiter }) = self.quoting else {
            return memchr(b'\n', bytes);
        };
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            // Inside a field only few bytes matter: jump to the next of them.
            let skip = match self.place {
                Place::Quoted => memchr(quote, rest),
                Place::Plain => memchr2(delimiter, b'\n', rest),
                Place::FieldStart | Place::AfterQuote => Some(0),
            };
            at += skip?;
            let byte = bytes[at];
            self.place = match self.place {
                Place::Quoted => Place::AfterQuote,
                Place::FieldStart | Place::AfterQuote if byte == quote => Place::Quoted,
                _ if byte == b'\n' => return Some(at),
                _ if byte == delimiter => Place::FieldStart,
                _ => Place::Plain,
            };
            at += 1;
        }
        None
    }

    /// Whether a quote is open.
    pub(super) fn is_open(&self) -> bool {
        self.place == Place::Quoted
    }
}

/// Without the `\r` of a `\r\n`.
pub(super) fn trim(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// How the search for a record's end went.
enum Found {
    /// This many bytes, and this many with the line end.
    Record { text: usize, whole: usize },
    /// No record here.
    Reject(RejectReason),
    /// The range is read.
    Nothing,
}

/// Reads the records of a byte range in order.
#[derive(Debug)]
pub struct LineReader {
    file: File,
    path: PathBuf,
    framing: Framing,
    range: Range<u64>,
    buffer: Vec<u8>,
    /// The offset in the file of the buffer's first byte.
    base: u64,
    /// What of the buffer is read from the file and not yet taken.
    unread: Range<usize>,
    head: Vec<u8>,
}

impl LineReader {
    /// Opens `path` at the start of `range`, which begins and ends at line starts. That the file
    /// ends before the range does is found when that is read.
    ///
    /// # Errors
    /// When the file cannot be opened, or is not a regular file.
    pub fn open(path: &Path, range: Range<u64>, framing: Framing) -> Result<Self, InputError> {
        Ok(Self::over(open(path)?.0, path, range, framing))
    }

    /// The same with a file that is open.
    pub(super) fn over(file: File, path: &Path, range: Range<u64>, framing: Framing) -> Self {
        Self {
            file,
            path: path.into(),
            framing,
            base: range.start,
            range,
            buffer: vec![0; BLOCK],
            unread: 0..0,
            head: Vec::new(),
        }
    }

    /// The offset of the next record: what a cell has to hold to resume here.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.base + self.unread.start as u64
    }

    /// Goes to `offset`, which a reader of the same range gave as its position.
    ///
    /// # Errors
    /// When the offset does not lie in the range.
    pub fn seek(&mut self, offset: u64) -> Result<(), InputError> {
        if offset < self.range.start || offset > self.range.end {
            let (path, range) = (self.path.clone(), self.range.clone());
            return Err(InputError::Offset { path, offset, range });
        }
        self.base = offset;
        self.unread = 0..0;
        Ok(())
    }

    /// The next record or reject; `None` at the range's end.
    ///
    /// # Errors
    /// When the file cannot be read, or has become shorter than the range.
    #[allow(clippy::should_implement_trait, reason = "an iterator cannot lend its buffer")]
    #[inline]
    pub fn next(&mut self) -> Result<Option<Next<'_>>, InputError> {
        loop {
            let offset = self.position();
            match self.find()? {
                Found::Nothing => return Ok(None),
                Found::Reject(reason) => return self.reject(offset, reason).map(Some),
                Found::Record { text, whole } => {
                    let start = self.unread.start;
                    self.unread.start += whole;
                    let blank = trim(&self.buffer[start..start + text]).is_empty();
                    if !(blank && self.framing.skip_blank) {
                        let text = trim(&self.buffer[start..start + text]);
                        return Ok(Some(Next::Line { offset, text }));
                    }
                }
            }
        }
    }

    /// Looks for the end of the record at the position, reading on as needed; takes nothing.
    #[inline]
    fn find(&mut self) -> Result<Found, InputError> {
        let limit = self.framing.max_bytes;
        let mut scanner = Scanner::new(self.framing.quoting);
        let mut searched = 0;
        loop {
            let unread = &self.buffer[self.unread.clone()];
            if let Some(more) = scanner.end(&unread[searched..]) {
                let text = searched + more;
                if text > limit {
                    return Ok(Found::Reject(self.excess(limit)));
                }
                return Ok(Found::Record { text, whole: text + 1 });
            }
            searched = unread.len();
            if searched > limit {
                return Ok(Found::Reject(self.excess(limit)));
            }
            if !self.fill()? {
                return Ok(match searched {
                    0 => Found::Nothing,
                    _ if scanner.is_open() => Found::Reject(RejectReason::OpenQuote),
                    text => Found::Record { text, whole: text },
                });
            }
        }
    }

    /// Which of the two a record of more than `limit` buffered bytes is.
    fn excess(&self, limit: usize) -> RejectReason {
        let start = self.unread.start;
        match memchr(b'\n', &self.buffer[start..=start + limit]) {
            Some(_) => RejectReason::LongQuote { limit },
            None => RejectReason::TooLong { limit },
        }
    }

    /// Reads the next block behind the unread bytes; false at the range's end.
    fn fill(&mut self) -> Result<bool, InputError> {
        self.buffer.copy_within(self.unread.clone(), 0);
        self.base += self.unread.start as u64;
        self.unread = 0..self.unread.len();
        let at = self.base + self.unread.end as u64;
        if at >= self.range.end {
            return Ok(false);
        }
        if self.unread.end == self.buffer.len() {
            // Full of one record, which is not longer than allowed yet: double, up to the bound.
            let bound = self.framing.max_bytes.saturating_add(2 * BLOCK);
            self.buffer.resize((self.buffer.len() * 2).min(bound), 0);
        }
        let left = usize::try_from(self.range.end - at).unwrap_or(usize::MAX);
        let room = (self.buffer.len() - self.unread.end).min(left).min(BLOCK);
        let into = self.unread.end..self.unread.end + room;
        let read = loop {
            match self.file.read_at(&mut self.buffer[into.clone()], at) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match read {
            Ok(0) => {
                let (path, planned) = (self.path.clone(), self.range.end);
                // A block may reach beyond what is left: say how long the file is, not how far it
                // was read.
                let found = self.file.metadata().map_or(at, |meta| meta.len().min(at));
                Err(InputError::Shrunk { path, planned, found })
            }
            Ok(bytes) => {
                self.unread.end += bytes;
                Ok(true)
            }
            Err(source) => {
                Err(InputError::System { doing: "read", path: self.path.clone(), source })
            }
        }
    }

    /// Passes over the line at the position, keeping its first bytes.
    fn reject(&mut self, offset: u64, reason: RejectReason) -> Result<Next<'_>, InputError> {
        self.head.clear();
        let mut bytes = 0;
        loop {
            let unread = &self.buffer[self.unread.clone()];
            let end = memchr(b'\n', unread);
            let text = &unread[..end.unwrap_or(unread.len())];
            self.head.extend_from_slice(&text[..text.len().min(HEAD - self.head.len())]);
            bytes += text.len() as u64;
            self.unread.start += text.len() + usize::from(end.is_some());
            if end.is_some() || !self.fill()? {
                return Ok(Next::Reject { offset, head: &self.head, bytes, reason });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const QUOTING: Quoting = Quoting { quote: b'"', delimiter: b',' };

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(bytes).expect("room for a temporary file");
        file
    }

    /// All that a reader yields from `from` on: offset, bytes, reason, position afterwards.
    fn read(
        path: &Path,
        end: u64,
        framing: Framing,
        from: u64,
    ) -> Vec<(u64, Vec<u8>, Option<RejectReason>, u64)> {
        let mut reader = LineReader::open(path, 0..end, framing).expect("it opens");
        reader.seek(from).expect("an offset in the range");
        let mut all = Vec::new();
        loop {
            let (offset, bytes, reason) = match reader.next().expect("it reads") {
                None => return all,
                Some(Next::Line { offset, text }) => (offset, text.to_vec(), None),
                Some(Next::Reject { offset, head, reason, .. }) => {
                    (offset, head.to_vec(), Some(reason))
                }
            };
            all.push((offset, bytes, reason, reader.position()));
        }
    }

    fn check(bytes: &[u8], framing: Framing, expected: &[(u64, &str, Option<RejectReason>)]) {
        let file = file(bytes);
        let end = bytes.len() as u64;
        let all = read(file.path(), end, framing, 0);
        let seen: Vec<_> = all
            .iter()
            .map(|(offset, bytes, reason, _)| {
                (*offset, std::str::from_utf8(bytes).expect("UTF-8"), *reason)
            })
            .collect();
        assert_eq!(seen, expected);
        // A reader that resumes at any position yields the rest.
        for (done, record) in all.iter().enumerate() {
            assert_eq!(read(file.path(), end, framing, record.3), all[done + 1..]);
        }
    }

    #[test]
    fn lines_come_without_their_ends_and_with_their_offsets() {
        check(
            b"a\n\nbc\r\n\r\nd",
            Framing::text(),
            &[(0, "a", None), (2, "", None), (3, "bc", None), (7, "", None), (9, "d", None)],
        );
        check(b"\n\na\r\n\r\n\n", Framing::json(), &[(2, "a", None)]);
        check(b"", Framing::text(), &[]);
        check(b"\n", Framing::text(), &[(0, "", None)]);
    }

    #[test]
    fn a_quoted_record_spans_lines_and_ends_exactly() {
        let framing = Framing::quoted_csv(false, QUOTING);
        check(
            b"1,\"a\nb\"\r\n2,\"say \"\"x\n\"\"\"\n3,5\" pipe\n\n\"4\"\n",
            framing,
            &[
                (0, "1,\"a\nb\"", None),
                (9, "2,\"say \"\"x\n\"\"\"", None),
                (24, "3,5\" pipe", None),
                (35, "\"4\"", None),
            ],
        );
    }

    #[test]
    fn a_stray_quote_costs_one_line() {
        let open = Some(RejectReason::OpenQuote);
        check(
            b"1,a\n2,\"b\n3,c\n4,d",
            Framing::quoted_csv(false, QUOTING),
            &[(0, "1,a", None), (4, "2,\"b", open), (9, "3,c", None), (13, "4,d", None)],
        );
        let framing = Framing { max_bytes: 8, ..Framing::quoted_csv(false, QUOTING) };
        let long = Some(RejectReason::LongQuote { limit: 8 });
        check(
            b"1,\"b\n3,cccc\n4,\"d\"\n",
            framing,
            &[(0, "1,\"b", long), (5, "3,cccc", None), (12, "4,\"d\"", None)],
        );
    }

    #[test]
    fn a_line_above_the_limit_is_a_reject_and_one_at_the_limit_is_not() {
        let framing = Framing { max_bytes: 4, ..Framing::text() };
        let long = Some(RejectReason::TooLong { limit: 4 });
        check(
            b"abcd\nabcde\nx\nabcdefgh",
            framing,
            &[(0, "abcd", None), (5, "abcde", long), (11, "x", None), (13, "abcdefgh", long)],
        );
    }

    #[test]
    fn lines_longer_than_a_block_are_whole_and_the_buffer_stays_bounded() {
        let limit = 5 * BLOCK / 2;
        let framing = Framing { max_bytes: limit, ..Framing::text() };
        let mut bytes = Vec::new();
        for length in [3, BLOCK - 1, BLOCK, BLOCK + 1, limit, limit + 1, 4 * limit, 7, 2 * BLOCK] {
            bytes.resize(bytes.len() + length, b'a' + (length % 26) as u8);
            bytes.push(b'\n');
        }
        let file = file(&bytes);
        let mut reader = LineReader::open(file.path(), 0..bytes.len() as u64, framing).unwrap();
        for line in bytes.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n') {
            match reader.next().unwrap().unwrap() {
                Next::Line { text, .. } => assert_eq!((text, text.len() <= limit), (line, true)),
                Next::Reject { head, bytes, .. } => {
                    assert_eq!((head, bytes), (&line[..HEAD], line.len() as u64));
                    assert!(line.len() > limit);
                }
            }
        }
        assert_eq!(reader.next().unwrap(), None);
        assert!(reader.buffer.len() <= limit + 2 * BLOCK);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_not_a_crash() {
        let file = file(&vec![b'\n'; 2 * BLOCK]);
        let mut reader =
            LineReader::open(file.path(), 0..2 * BLOCK as u64, Framing::text()).unwrap();
        reader.next().unwrap();
        file.as_file().set_len(BLOCK as u64).unwrap();
        let error = loop {
            match reader.next() {
                Ok(next) => assert!(next.is_some(), "the end must not be taken for the range's"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, InputError::Shrunk { found: 0x40000, .. }), "{error}");
        let mut reader =
            LineReader::open(file.path(), 0..2 * BLOCK as u64, Framing::text()).unwrap();
        let whole = std::iter::from_fn(|| reader.next().ok().map(|next| assert!(next.is_some())));
        assert_eq!(whole.count(), BLOCK, "what is left can be read");
    }

    #[test]
    fn an_offset_outside_the_range_and_a_folder_are_refused() {
        let file = file(b"a\nb\nc\n");
        let mut reader = LineReader::open(file.path(), 2..4, Framing::text()).unwrap();
        assert!(matches!(reader.seek(0), Err(InputError::Offset { offset: 0, .. })));
        assert!(matches!(reader.seek(5), Err(InputError::Offset { offset: 5, .. })));
        assert_eq!(reader.next().unwrap(), Some(Next::Line { offset: 2, text: b"b" }));
        assert_eq!(reader.next().unwrap(), None);
        let folder = tempfile::tempdir().unwrap();
        let error = LineReader::open(folder.path(), 0..0, Framing::text());
        assert!(matches!(error, Err(InputError::NotAFile { .. })));
    }
}
