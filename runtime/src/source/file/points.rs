//! Where a file's header ends and where it is cut, found by each worker for itself from a few reads
//! into private memory: a file that is cut short meanwhile ends nobody.
//!
//! Invariants:
//! - in a file as it was measured, the points are those of its bytes alone: the same in every
//!   process and every life of a worker;
//! - of a file that was cut short or replaced, points that cannot be read any more lie where they
//!   would if all lines were short: behind them there is nothing to read.
//!
//! Called by `split`.

use super::lines::{BLOCK, Framing, InputError, open_known};
use super::split::InputFile;
use memchr::memchr;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A file as it was measured, or what is left of it.
struct Left {
    file: Option<File>,
    bytes: u64,
}

impl Left {
    fn of(input: &InputFile) -> Result<Self, InputError> {
        match open_known(&input.path, input.identity) {
            Ok((file, size)) => Ok(Self { file: Some(file), bytes: size.min(input.end) }),
            Err(error) if error.is_loss() => Ok(Self { file: None, bytes: 0 }),
            Err(error) => Err(error),
        }
    }

    /// Up to `most` bytes from an offset on; fewer at the end of what is left.
    fn read(&self, input: &InputFile, at: u64, most: usize) -> Result<Vec<u8>, InputError> {
        let Some(file) = &self.file else { return Ok(Vec::new()) };
        let most = usize::try_from(self.bytes.saturating_sub(at)).unwrap_or(most).min(most);
        let (mut bytes, mut done) = (vec![0; most], 0);
        while done < most {
            match file.read_at(&mut bytes[done..], at + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let path = input.path.clone();
                    return Err(InputError::System { doing: "read", path, source });
                }
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// The header's text, if it is there as a whole, and where the first line behind it begins.
    fn preamble(
        &self,
        input: &InputFile,
        framing: &Framing,
    ) -> Result<(Option<Vec<u8>>, u64), InputError> {
        let mut most = BLOCK;
        loop {
            let bytes = self.read(input, 0, most)?;
            let is_all = bytes.len() as u64 == self.bytes || bytes.len() < most;
            let found = input.preamble(&bytes, framing);
            let is_longer = match &found {
                Ok((_, data)) => framing.header && *data == bytes.len(),
                Err(_) => true,
            };
            if is_longer && !is_all && most <= framing.max_bytes {
                most *= 2;
                continue;
            }
            let is_cut = is_longer && bytes.len() as u64 != input.end;
            if is_cut && is_all {
                return Ok((None, bytes.len() as u64));
            }
            let (text, data) = found?;
            let header = (data > text.start).then(|| bytes[text].to_vec());
            return Ok((header, data as u64));
        }
    }

    /// The first line start at or after an offset; the offset itself where that is gone.
    fn line_start(&self, input: &InputFile, ideal: u64) -> Result<u64, InputError> {
        // A line starts at `ideal` itself when the byte before it ends one.
        let mut at = ideal - 1;
        loop {
            let bytes = self.read(input, at, BLOCK)?;
            if let Some(end) = memchr(b'\n', &bytes) {
                return Ok(at + end as u64 + 1);
            }
            at += bytes.len() as u64;
            if bytes.is_empty() {
                return Ok(if at >= input.end { input.end } else { ideal });
            }
        }
    }
}

/// The points between the `parts` ranges of a file, its ends included.
pub(super) fn of(
    input: &InputFile,
    framing: &Framing,
    parts: usize,
) -> Result<Vec<u64>, InputError> {
    let left = Left::of(input)?;
    let (_, data) = left.preamble(input, framing)?;
    let data = data.min(input.end);
    let point = |part: usize| {
        // In 128 bits the product of two 64-bit numbers cannot overflow.
        let ideal = u128::from(input.end) * part as u128 / parts as u128;
        let ideal = u64::try_from(ideal).unwrap_or(input.end);
        match ideal {
            _ if ideal <= data => Ok(data),
            _ if part == parts => Ok(input.end),
            _ => left.line_start(input, ideal),
        }
    };
    (0..=parts).map(point).collect()
}

/// The header of a file; `None` where it is empty, or its header is gone.
pub(super) fn header(input: &InputFile, framing: &Framing) -> Result<Option<Vec<u8>>, InputError> {
    Ok(Left::of(input)?.preamble(input, framing)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_cut_short_keeps_the_points_that_are_left() {
        let folder = tempfile::tempdir().expect("room for a folder");
        let path = folder.path().join("in");
        let line = |n: usize| format!("{n:09}\n");
        let text: String = "head\n".to_owned() + &(0..10_000).map(line).collect::<String>();
        std::fs::write(&path, &text).expect("room for a file");
        let input = InputFile::measure(&path).expect("it is there");
        let framing = Framing::csv(true);
        let before = of(&input, &framing, 4).expect("it is there");
        assert_eq!(before[0], 5);
        assert_eq!(before[4], text.len() as u64);
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("it is there");
        file.set_len(before[2] + 3).expect("our own file");
        let after = of(&input, &framing, 4).expect("what is left");
        assert_eq!(after[..3], before[..3]);
        assert!(after[3] > after[2] && after[3] < after[4] && after[4] == before[4], "{after:?}");
        assert_eq!(header(&input, &framing).expect("it is left"), Some(b"head".to_vec()));
        file.set_len(2).expect("our own file");
        assert_eq!(header(&input, &framing).expect("nothing is left"), None);
        std::fs::remove_file(&path).expect("our own file");
        assert_eq!(header(&input, &framing).expect("it is gone"), None);
        assert_eq!(of(&input, &framing, 1).expect("it is gone")[1], text.len() as u64);
    }
}
