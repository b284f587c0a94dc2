//! One line of a rejects file: an input line that could not be read, why, and where it stands.
//!
//! `file:byte_offset`, a tab, the reason, a tab, the line. In each of the three a backslash is
//! written `\\`, a tab `\t`, line ends `\n` and `\r`, and any other control character, and any byte
//! that is not UTF-8, `\xNN`; everything else stands for itself.
//!
//! Invariants:
//! - what is appended is one line of valid UTF-8 with exactly two tabs, whatever the input was;
//! - escaping loses nothing: the first [`LINE_CAP`] bytes of the input line can be had back. A
//!   longer line ends in `\...+N`, N being the bytes left out.
//!
//! Called by the file source; the bytes go to a file sink of its own, so that they are written
//! exactly once as any other output.

use std::io::Write;

/// Bytes of an input line that a rejects file shows.
pub const LINE_CAP: usize = 64 * 1024;

/// Appends the line, with its line end, for the input `line` of `bytes` bytes (of which `line` may
/// hold only the first) that starts at `offset` in `file`.
pub fn append(into: &mut Vec<u8>, file: &[u8], offset: u64, reason: &str, line: &[u8], bytes: u64) {
    escape(into, file);
    into.push(b':');
    decimal(into, offset);
    into.push(b'\t');
    escape(into, reason.as_bytes());
    into.push(b'\t');
    let shown = &line[..shown_bytes(line)];
    escape(into, shown);
    let left = bytes.saturating_sub(shown.len() as u64);
    if left > 0 {
        into.extend_from_slice(b"\\...+");
        decimal(into, left);
    }
    into.push(b'\n');
}

/// How much of a line is shown: up to the cap, without cutting a character in two.
fn shown_bytes(line: &[u8]) -> usize {
    if line.len() <= LINE_CAP {
        return line.len();
    }
    // A character has at most three bytes after its first; more in a row are not UTF-8 anyway.
    let first = |at: &usize| line[*at] & 0b1100_0000 != 0b1000_0000;
    (LINE_CAP - 3..=LINE_CAP).rev().find(first).unwrap_or(LINE_CAP)
}

fn decimal(into: &mut Vec<u8>, number: u64) {
    // A vector takes every write.
    let _ = write!(into, "{number}");
}

fn escape(into: &mut Vec<u8>, bytes: &[u8]) {
    into.reserve(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => into.extend_from_slice(b"\\\\"),
                '\t' => into.extend_from_slice(b"\\t"),
                '\n' => into.extend_from_slice(b"\\n"),
                '\r' => into.extend_from_slice(b"\\r"),
                _ if character.is_control() => hex(into, character),
                _ => into.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        chunk.invalid().iter().for_each(|byte| hex_byte(into, *byte));
    }
}

/// A control character as the bytes of its UTF-8.
fn hex(into: &mut Vec<u8>, character: char) {
    character.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| hex_byte(into, byte));
}

fn hex_byte(into: &mut Vec<u8>, byte: u8) {
    let _ = write!(into, "\\x{byte:02X}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(line: &[u8], reason: &str) -> String {
        let mut out = Vec::new();
        append(&mut out, b"in.csv", 42, reason, line, line.len() as u64);
        String::from_utf8(out).expect("a rejects line is UTF-8")
    }

    /// Undoes the escaping, as a reader of rejects files would.
    fn unescape(text: &str) -> Vec<u8> {
        let (mut out, mut rest) = (Vec::new(), text.as_bytes());
        while let [first, tail @ ..] = rest {
            rest = match (first, tail) {
                (b'\\', [b'x', digits @ ..]) => {
                    let digit = |at: usize| char::from(digits[at]).to_digit(16).unwrap() as u8;
                    out.push(digit(0) * 16 + digit(1));
                    &digits[2..]
                }
                (b'\\', [kind, tail @ ..]) => {
                    out.push(match kind {
                        b't' => b'\t',
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b'\\' => b'\\',
                        other => panic!("unknown escape {other}"),
                    });
                    tail
                }
                _ => {
                    out.push(*first);
                    tail
                }
            };
        }
        out
    }

    #[test]
    fn a_plain_line_is_readable_as_it_is() {
        assert_eq!(formatted("a,ü,3".as_bytes(), "no"), "in.csv:42\tno\ta,ü,3\n");
    }

    #[test]
    fn any_bytes_become_one_line_with_two_tabs_and_come_back() {
        let mut state = 7_u64;
        for _ in 0..300 {
            let bytes: Vec<u8> = (0..200)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Half of the bytes from the troublesome ones.
                    let byte = (state >> 40) as u8;
                    if state >> 63 == 0 {
                        b"\t\n\r\\x\0\x7f\xc3\xa9\xff"[usize::from(byte) % 10]
                    } else {
                        byte
                    }
                })
                .collect();
            let line = formatted(&bytes, "tab\tand\nline");
            let fields: Vec<&str> = line.strip_suffix('\n').unwrap().split('\t').collect();
            assert_eq!(line.matches('\n').count(), 1);
            assert_eq!(fields[..2], ["in.csv:42", "tab\\tand\\nline"]);
            assert_eq!(fields.len(), 3);
            assert_eq!(unescape(fields[2]), bytes);
        }
    }

    #[test]
    fn a_long_line_is_cut_between_characters_and_says_by_how_much() {
        let line = "é".repeat(LINE_CAP);
        let shifted = format!("a{line}");
        assert!(formatted(line.as_bytes(), "r").ends_with("éé\\...+65536\n"));
        assert!(formatted(shifted.as_bytes(), "r").ends_with("éé\\...+65538\n"));
    }

    #[test]
    fn a_line_of_which_only_the_head_is_kept_tells_its_length() {
        let mut out = Vec::new();
        append(&mut out, b"a:b\t", 0, "long", b"head", 1_000);
        assert_eq!(out, b"a:b\\t:0\tlong\thead\\...+996\n");
    }
}
