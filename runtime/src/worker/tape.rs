//! The tape: what the sources of a worker gave in a step, so that its replica takes the same from
//! sources of its own.
//!
//! A note is: stage and part, how the reading ended, how many records and refusals it gave, the
//! position afterwards. A replica reads so many records from where it stands and then goes to that
//! position: what made the worker stop there (a clock, a file that was not there yet) is nothing
//! that it could find out for itself.
//!
//! Invariants: notes are in the order of the readings; nothing is noted where nobody follows.
//!
//! Called by `source::stage`; kept by `journal`, played back by `follow`.

use crate::source::Progress;

/// What a tape is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing.
    #[default]
    Off,
    /// To note what is read.
    Note,
    /// To be told what was read: this is a replica.
    Tell,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    pub(crate) mode: Mode,
    /// The notes of the open step.
    pub(crate) words: Vec<u64>,
    at: usize,
}

/// One reading of a source.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) part: usize,
    /// Records and refusals.
    pub(crate) count: usize,
    pub(crate) progress: Progress,
    /// The bytes of the position.
    pub(crate) position: Vec<u8>,
}

/// Times that a replica's source is asked again when it has nothing yet.
const TRIES: u32 = 200;

const MORE: u64 = 0;
const IDLE: u64 = 1;
const BLOCKED: u64 = 2;
const END: u64 = 3;

impl Tape {
    /// A step begins.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.words.clear();
        self.at = 0;
    }

    /// Notes a reading.
    pub(crate) fn note(
        &mut self,
        stage: u32,
        part: usize,
        count: usize,
        progress: &Progress,
        position: &[u8],
    ) {
        let how = match progress {
            Progress::More => MORE,
            Progress::Idle { .. } => IDLE,
            Progress::Blocked { .. } => BLOCKED,
            Progress::End => END,
        };
        let head = u64::from(stage) | (part as u64) << 24 | how << 48;
        self.words.extend([head, count as u64, position.len() as u64]);
        for part in position.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.words.push(u64::from_le_bytes(word));
        }
    }

    /// The next reading, if it is this stage's.
    pub(crate) fn told(&mut self, stage: u32) -> Option<Told> {
        let [head, count, bytes] = *self.words.get(self.at..self.at + 3)? else { return None };
        if head & 0xFF_FFFF != u64::from(stage) {
            return None;
        }
        let words = self.words.get(self.at + 3..)?.get(..(bytes as usize).div_ceil(8))?;
        let mut position: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        position.truncate(bytes as usize);
        self.at += 3 + words.len();
        let progress = match head >> 48 {
            END => Progress::End,
            MORE => Progress::More,
            // When it goes on is the worker's business.
            _ => Progress::Idle { until_ns: 0 },
        };
        Some(Told {
            part: (head >> 24 & 0xFF_FFFF) as usize,
            count: count as usize,
            progress,
            position,
        })
    }

    /// Whether all was told that there is.
    pub(crate) fn is_over(&self) -> bool {
        self.at == self.words.len()
    }
}

impl Told {
    /// Reads what the worker read: `read` is given how much is still wanted, and says how much
    /// there is in all so far.
    pub(crate) fn play(
        &self,
        mut read: impl FnMut(usize) -> Result<usize, String>,
    ) -> Result<Progress, String> {
        let (mut got, mut tries) = (0, 0);
        while got < self.count {
            let now = read(self.count - got)?;
            if now == got {
                tries += 1;
                if tries == TRIES {
                    return Err(format!(
                        "the replica finds {got} records where the worker found {}: it is no source \
                         that can be read twice at the same time",
                        self.count
                    ));
                }
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            got = now;
        }
        Ok(self.progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_told_as_they_were_noted_each_to_its_stage() {
        let mut tape = Tape::default();
        tape.note(3, 1, 20, &Progress::More, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        tape.note(4, 0, 0, &Progress::End, &[]);
        assert!(tape.told(4).is_none(), "the first one is another stage's");
        let told = tape.told(3).expect("a reading");
        assert_eq!((told.part, told.count, told.progress), (1, 20, Progress::More));
        assert_eq!(told.position, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let told = tape.told(4).expect("a reading");
        assert_eq!((told.count, told.progress, told.position.len()), (0, Progress::End, 0));
        assert!(tape.told(4).is_none() && tape.is_over());
    }

    #[test]
    fn a_source_that_gives_little_is_asked_again_and_one_that_gives_nothing_is_refused() {
        let told = Told { part: 0, count: 5, progress: Progress::More, position: Vec::new() };
        let mut all = 0;
        let played = told.play(|wanted| {
            all += wanted.min(2);
            Ok(all)
        });
        assert_eq!((played, all), (Ok(Progress::More), 5));
        assert!(told.play(|_| Ok(0)).is_err_and(|error| error.contains("0 records")));
    }
}
