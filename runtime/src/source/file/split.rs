//! Which subtask reads which bytes of which input file, and where a limit on records ends them.
//!
//! Invariants:
//! - every line belongs to exactly one range; ranges begin and end at line starts (or at the
//!   file's end), after a byte order mark and a header;
//! - the ranges follow from the files' bytes, the [`Framing`] and the number of subtasks alone: the
//!   supervisor measures the files once ([`InputFile::measure`]), and any process that plans from
//!   these measures computes the same ranges. A file that has grown since is read as far as it was
//!   measured; one that has shrunk is an error;
//! - a file whose records may span lines is never cut.
//!
//! Why maps here and not in [`super::lines`]: planning touches a header, one page for each cut, or,
//! for a limit, scans once from the start without wanting the bytes; a map does that without
//! copying. Its danger, SIGBUS when another program shortens the file, is confined to the moment of
//! planning: the size is compared before a file is mapped and once more before a result is
//! believed, and no step is open. The data path reads all day long, so it uses `pread`.
//!
//! Called once by each process that plans the file source.

use super::lines::{
    self, BYTE_ORDER_MARK, Framing, Identity, InputError, LineReader, RejectReason, Scanner,
};
use super::points;
use memchr::memchr_iter;
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An input file and how much of it the job reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// The bytes from here on are not read: the file's size when the job started, or less where a
    /// limit ends it.
    pub end: u64,
    /// What it is to the kernel, whatever file has its name later.
    pub identity: Identity,
}

impl InputFile {
    /// The whole file as it is now.
    ///
    /// # Errors
    /// When it cannot be opened or is not a regular file.
    pub fn measure(path: &Path) -> Result<Self, InputError> {
        let (file, end) = lines::open(path)?;
        let failed = |source| InputError::System { doing: "measure", path: path.into(), source };
        Ok(Self { path: path.into(), end, identity: lines::identity(&file).map_err(failed)? })
    }

    /// Gives the file's planned bytes, mapped, to `look`, between two comparisons of its size.
    fn look<R>(&self, look: impl FnOnce(&[u8]) -> Result<R, InputError>) -> Result<R, InputError> {
        let (file, size) = lines::open(&self.path)?;
        self.check(size)?;
        if self.end == 0 {
            return look(&[]);
        }
        let map = self.map(&file).map_err(|source| self.failed("map", source))?;
        let found = look(&map)?;
        let size = file.metadata().map_err(|source| self.failed("measure", source))?.len();
        self.check(size)?;
        Ok(found)
    }

    #[allow(unsafe_code, reason = "planning scans read a file in place; the header says why")]
    fn map(&self, file: &File) -> std::io::Result<Mmap> {
        let bytes = usize::try_from(self.end).map_err(std::io::Error::other)?;
        // SAFETY: the map is read-only, lives for one scan of a file that holds `bytes` bytes, and
        // what is seen through it is only searched for byte values, each loaded once: changing
        // bytes can give a wrong position but touch no memory. A file cut short within the scan
        // ends the process with SIGBUS; it does not corrupt it.
        unsafe { MmapOptions::new().len(bytes).map(file) }
    }

    fn check(&self, found: u64) -> Result<(), InputError> {
        if found < self.end {
            let (path, planned) = (self.path.clone(), self.end);
            return Err(InputError::Shrunk { path, planned, found });
        }
        Ok(())
    }

    fn failed(&self, doing: &'static str, source: std::io::Error) -> InputError {
        InputError::System { doing, path: self.path.clone(), source }
    }

    /// Where the header's text lies, and where the first line after it starts.
    pub(super) fn preamble(
        &self,
        bytes: &[u8],
        framing: &Framing,
    ) -> Result<(Range<usize>, usize), InputError> {
        let start = if bytes.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        if !framing.header || bytes.len() == start {
            return Ok((start..start, start));
        }
        let mut scanner = Scanner::new(framing.quoting);
        let (end, data) = match scanner.end(&bytes[start..]) {
            Some(at) => (start + at, start + at + 1),
            None => (bytes.len(), bytes.len()),
        };
        let limit = framing.max_bytes;
        let reason = match end - start {
            _ if scanner.is_open() => RejectReason::OpenQuote,
            length if length > limit => RejectReason::TooLong { limit },
            _ => return Ok((start..start + lines::trim(&bytes[start..end]).len(), data)),
        };
        Err(InputError::HeaderRecord { path: self.path.clone(), reason })
    }
}

/// Bytes of one file that one subtask reads, in the order of its list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByteRange {
    /// Index into the list of input files.
    pub file: usize,
    /// The bytes: never empty, from a line start to a line start or the file's end.
    pub bytes: Range<u64>,
}

/// How files are shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Each file is cut at line ends into one range per subtask.
    AtLines,
    /// Whole files: file `i` goes to subtask `i` modulo their number (`--no-split`), so that files
    /// are still read in parallel and each one's records stay in order.
    WholeFiles,
}

/// For each of the `subtasks` (at least one) the ranges that it reads. Files with quoted line ends
/// stay whole, whatever `cut` says.
///
/// # Errors
/// When a file cannot be read, or has another header than the first. What is gone of one that was
/// cut short is found when it is read.
pub fn split(
    files: &[InputFile],
    framing: &Framing,
    subtasks: usize,
    cut: Cut,
) -> Result<Vec<Vec<ByteRange>>, InputError> {
    assert!(subtasks > 0, "a file source has at least one subtask");
    header(files, framing)?;
    let mut ranges = vec![Vec::new(); subtasks];
    for (index, file) in files.iter().enumerate() {
        let whole = cut == Cut::WholeFiles || framing.quoting.is_some();
        let parts = if whole { 1 } else { subtasks };
        let points = points::of(file, framing, parts)?;
        for (part, pair) in points.windows(2).enumerate() {
            if pair[0] < pair[1] {
                let subtask = if whole { index % subtasks } else { part };
                ranges[subtask].push(ByteRange { file: index, bytes: pair[0]..pair[1] });
            }
        }
    }
    Ok(ranges)
}

/// The header that all files share, without its line end; `None` where the framing has none or all
/// files are empty.
///
/// # Errors
/// When a file cannot be read, or two files differ in their headers.
pub fn header(files: &[InputFile], framing: &Framing) -> Result<Option<Vec<u8>>, InputError> {
    if !framing.header {
        return Ok(None);
    }
    let mut first: Option<(&InputFile, Vec<u8>)> = None;
    for file in files {
        let found = points::header(file, framing)?;
        match (&first, found) {
            (_, None) => {}
            (None, Some(found)) => first = Some((file, found)),
            (Some((_, expected)), Some(found)) if *expected == found => {}
            (Some((first, expected)), Some(found)) => {
                return Err(InputError::Header {
                    path: file.path.clone(),
                    found: String::from_utf8_lossy(&found).into_owned(),
                    first: first.path.clone(),
                    expected: String::from_utf8_lossy(expected).into_owned(),
                });
            }
        }
    }
    Ok(first.map(|(_, header)| header))
}

/// The same files, ended so that they hold exactly the first `records` records (`--limit`). Rejects
/// count; headers, and blank lines where the framing skips them, do not.
///
/// # Errors
/// When a file cannot be read or is shorter than measured.
pub fn limit(
    files: &[InputFile],
    framing: &Framing,
    records: u64,
) -> Result<Vec<InputFile>, InputError> {
    let mut left = records;
    let mut limited = Vec::with_capacity(files.len());
    for file in files {
        let end = match left {
            0 => 0,
            _ if framing.quoting.is_some() => nth_quoted_record(file, framing, &mut left)?,
            _ => file.look(|bytes| {
                let (_, data) = file.preamble(bytes, framing)?;
                Ok(nth_line(bytes, data, framing, &mut left) as u64)
            })?,
        };
        limited.push(InputFile { end, ..file.clone() });
    }
    Ok(limited)
}

/// Where the line ends that brings `left` to zero; the file's end if none does.
fn nth_line(bytes: &[u8], data: usize, framing: &Framing, left: &mut u64) -> usize {
    let counts = |line: &[u8]| !(framing.skip_blank && lines::trim(line).is_empty());
    let mut start = data;
    for at in memchr_iter(b'\n', &bytes[data..]) {
        let end = data + at;
        if counts(&bytes[start..end]) {
            *left -= 1;
            if *left == 0 {
                return end + 1;
            }
        }
        start = end + 1;
    }
    if start < bytes.len() && counts(&bytes[start..]) {
        *left -= 1;
    }
    bytes.len()
}

/// As [`nth_line`], with the reader itself, so that both agree on what a quoted record is.
fn nth_quoted_record(
    file: &InputFile,
    framing: &Framing,
    left: &mut u64,
) -> Result<u64, InputError> {
    let (_, data) = file.look(|bytes| file.preamble(bytes, framing))?;
    let mut reader = LineReader::open(&file.path, data as u64..file.end, *framing)?;
    while *left > 0 && reader.next()?.is_some() {
        *left -= 1;
    }
    Ok(reader.position())
}

#[cfg(test)]
mod tests {
    use super::lines::{Next, Quoting};
    use super::*;
    use std::collections::BTreeSet;

    const QUOTING: Quoting = Quoting { quote: b'"', delimiter: b',' };

    /// Writes the files and measures them.
    fn files(folder: &tempfile::TempDir, contents: &[&[u8]]) -> Vec<InputFile> {
        let write = |(index, bytes): (usize, &&[u8])| {
            let path = folder.path().join(format!("{index}.in"));
            std::fs::write(&path, bytes).expect("room for a temporary file");
            InputFile::measure(&path).expect("it was just written")
        };
        contents.iter().enumerate().map(write).collect()
    }

    /// All records of all ranges: (file, offset, text); fails when one comes twice.
    fn records(
        files: &[InputFile],
        framing: &Framing,
        ranges: &[Vec<ByteRange>],
    ) -> BTreeSet<(usize, u64, Vec<u8>)> {
        let mut all = BTreeSet::new();
        for ByteRange { file, bytes } in ranges.iter().flatten() {
            let mut reader = LineReader::open(&files[*file].path, bytes.clone(), *framing).unwrap();
            while let Some(next) = reader.next().unwrap() {
                let (offset, bytes) = match next {
                    Next::Line { offset, text } => (offset, text),
                    Next::Reject { offset, head, .. } => (offset, head),
                };
                assert!(all.insert((*file, offset, bytes.to_vec())), "{offset} read twice");
            }
        }
        all
    }

    /// The records of a file by the plainest means.
    fn expected(index: usize, content: &[u8], framing: &Framing) -> Vec<(usize, u64, Vec<u8>)> {
        let start = if content.starts_with(BYTE_ORDER_MARK) { 3 } else { 0 };
        let mut offset = start as u64;
        let mut lines: Vec<&[u8]> = content[start..].split(|byte| *byte == b'\n').collect();
        if lines.last().is_some_and(|last| last.is_empty()) {
            lines.pop();
        }
        let mut all = Vec::new();
        for (number, line) in lines.into_iter().enumerate() {
            let text = line.strip_suffix(b"\r").unwrap_or(line);
            let skipped = framing.skip_blank && text.is_empty();
            if !(skipped || framing.header && number == 0) {
                all.push((index, offset, text.to_vec()));
            }
            offset += line.len() as u64 + 1;
        }
        all
    }

    fn check(contents: &[&[u8]], framing: &Framing, subtasks: usize) {
        let folder = tempfile::tempdir().unwrap();
        let files = files(&folder, contents);
        let all: Vec<_> = contents
            .iter()
            .enumerate()
            .flat_map(|(index, content)| expected(index, content, framing))
            .collect();
        for cut in [Cut::AtLines, Cut::WholeFiles] {
            let ranges = split(&files, framing, subtasks, cut).unwrap();
            assert_eq!(ranges.len(), subtasks);
            assert_eq!(ranges, split(&files, framing, subtasks, cut).unwrap());
            assert_eq!(records(&files, framing, &ranges), all.iter().cloned().collect());
        }
        for records_wanted in [0, 1, all.len() / 2, all.len(), all.len() + 1] {
            let limited = limit(&files, framing, records_wanted as u64).unwrap();
            let ranges = split(&limited, framing, subtasks, Cut::AtLines).unwrap();
            let first = all.iter().take(records_wanted).cloned().collect();
            assert_eq!(records(&files, framing, &ranges), first, "limit {records_wanted}");
        }
    }

    #[test]
    fn every_line_of_an_odd_file_belongs_to_one_range() {
        let contents: [&[u8]; 9] = [
            b"",
            b"\n",
            b"h",
            b"h\n",
            b"h\r\na\r\nb\r\n",
            b"h\na\nb",
            b"\xEF\xBB\xBFh\na\n",
            b"h\na\nbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\nc\n",
            b"h\n\n\n\r\na\n\n",
        ];
        for content in contents {
            for subtasks in [1, 2, 3, 7, 40] {
                for framing in [Framing::text(), Framing::json(), Framing::csv(true)] {
                    check(&[content], &framing, subtasks);
                }
            }
        }
        let headed: Vec<&[u8]> = contents[2..].to_vec();
        check(&headed, &Framing::csv(true), 4);
        check(&contents, &Framing::json(), 4);
    }

    #[test]
    fn every_line_of_random_files_belongs_to_one_range() {
        let mut state = 1_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for _ in 0..150 {
            let contents: Vec<Vec<u8>> = (0..1 + random(3))
                .map(|_| {
                    let mut content =
                        if random(2) == 0 { b"".to_vec() } else { b"head\n".to_vec() };
                    content.splice(0..0, BYTE_ORDER_MARK[..3 * random(2)].iter().copied());
                    let size = random(120);
                    content.extend((0..size).map(|_| b"ab\n\r\n"[random(5)]));
                    content
                })
                .collect();
            let contents: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            let subtasks = 1 + random(9);
            check(&contents, &Framing::text(), subtasks);
            check(&contents, &Framing::json(), subtasks);
            check(&contents[..1], &Framing::csv(true), subtasks);
        }
    }

    #[test]
    fn ranges_are_about_equal() {
        let folder = tempfile::tempdir().unwrap();
        let content = b"some line\n".repeat(1000);
        let files = files(&folder, &[&content]);
        let ranges = split(&files, &Framing::text(), 7, Cut::AtLines).unwrap();
        for range in ranges.iter().flatten() {
            let bytes = range.bytes.end - range.bytes.start;
            assert!((1420..=1440).contains(&bytes), "{range:?}");
        }
    }

    #[test]
    fn quoted_line_ends_keep_a_file_whole_and_count_as_one_record() {
        let folder = tempfile::tempdir().unwrap();
        let content: &[u8] = b"x,\"y\nz\"\n1,\"a\nb\"\n2,c\n\n3,\"d\n4,e\n";
        let files = files(&folder, &[content, content, b"x,\"y\nz\"\n"]);
        let framing = Framing::quoted_csv(true, QUOTING);
        assert_eq!(header(&files, &framing).unwrap().unwrap(), b"x,\"y\nz\"");
        let ranges = split(&files, &framing, 3, Cut::AtLines).unwrap();
        let whole = |file| vec![ByteRange { file, bytes: 8..content.len() as u64 }];
        assert_eq!(ranges, [whole(0), whole(1), vec![]]);
        for (wanted, end) in [(1, 16), (2, 20), (3, 26), (4, 30)] {
            let limited = limit(&files, &framing, wanted).unwrap();
            assert_eq!((limited[0].end, limited[1].end), (end, 0), "{wanted}");
        }
    }

    #[test]
    fn a_differing_header_names_both_files() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(&folder, &[b"", b"a,b\r\n1,2\r\n", b"a,b\n", b"b,a\n1,2\n"]);
        let framing = Framing::csv(true);
        assert_eq!(header(&files[..3], &framing).unwrap().unwrap(), b"a,b");
        let error = split(&files, &framing, 2, Cut::AtLines).unwrap_err().to_string();
        assert!(error.contains("3.in starts with \"b,a\"") && error.contains("1.in"), "{error}");
    }

    #[test]
    fn a_file_is_cut_as_it_was_measured_whether_it_grew_or_shrank() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(&folder, &[b"a\nb\n"]);
        let before = split(&files, &Framing::text(), 2, Cut::AtLines).unwrap();
        std::fs::write(&files[0].path, b"a\nb\nc\nd\n").unwrap();
        assert_eq!(split(&files, &Framing::text(), 2, Cut::AtLines).unwrap(), before);
        std::fs::write(&files[0].path, b"a\n").unwrap();
        assert_eq!(split(&files, &Framing::text(), 2, Cut::AtLines).unwrap(), before);
    }

    #[test]
    fn a_header_with_an_open_quote_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(&folder, &[b"a,\"b\n1,2\n"]);
        let error = header(&files, &Framing::quoted_csv(true, QUOTING)).unwrap_err();
        assert!(matches!(error, InputError::HeaderRecord { .. }), "{error}");
    }
}
