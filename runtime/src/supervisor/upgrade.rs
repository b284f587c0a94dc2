//! Another program for the supervisor, while the workers go on with theirs: checked for the same
//! plan before anything stops, then this supervisor leaves and the keeper starts the other one. One
//! that does not take the job over in time is followed by the program before (`keeper`).
//!
//! Called by `steer`.

use super::inquiry::{self, Inquiry};
use super::program::Program;
use super::recover::Crew;
use crate::control::protocol::Reply;
use crate::control::socket::ReplyTo;
use crate::keeper::Line;
use std::path::PathBuf;
use std::time::Duration;

/// How long the answer may take to leave this process.
const LEAVING: Duration = Duration::from_millis(50);

/// A program that is being asked.
#[derive(Debug)]
pub(super) struct Upgrade {
    path: PathBuf,
    inquiry: Inquiry,
    answer: ReplyTo,
    _held: Program,
}

impl Upgrade {
    /// Asks a program; without one, what lies now where this one was started from.
    pub(super) fn begin(path: Option<PathBuf>, answer: ReplyTo, crew: &Crew<'_>) -> Option<Self> {
        let path = path.unwrap_or_else(own_path);
        let begun = inquiry::check(&path).and_then(|held| {
            let inquiry = Inquiry::begin(crew, &held, "the new program");
            inquiry.map(|inquiry| (held, inquiry)).map_err(|error| error.to_string())
        });
        match begun {
            Ok((held, inquiry)) => Some(Self { path, inquiry, answer, _held: held }),
            Err(why) => {
                answer.send(Reply::error(format!("{}: {why}", path.display())));
                None
            }
        }
    }

    /// Takes a turn. Does not return once the other program is to lead.
    pub(super) fn look(mut self, crew: &Crew<'_>, line: &Line) -> Option<Self> {
        let described = match self.inquiry.look() {
            None => return Some(self),
            Some(Err(why)) => {
                self.answer.send(Reply::error(why));
                return None;
            }
            Some(Ok(described)) => described,
        };
        let (own, new) = (crew.plan().hash, described.hash);
        if own != new {
            self.answer.send(Reply::error(format!(
                "the new program plans another job ({new:016x}) than the one that runs \
                 ({own:016x}); testudo update brings changes to the workers too"
            )));
            return None;
        }
        if let Err(error) = line.upgrade(&self.path) {
            self.answer.send(Reply::error(error.to_string()));
            return None;
        }
        let supervisor = std::process::id();
        self.answer.send(Reply::Upgrading { supervisor, program: self.path.clone() });
        std::thread::sleep(LEAVING);
        // Nothing is put in order: whoever follows finds all as after a kill.
        std::process::exit(0)
    }
}

/// Where this program was started from, whatever lies there now.
fn own_path() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let text = own.to_string_lossy();
    text.strip_suffix(" (deleted)").map_or(own.clone(), PathBuf::from)
}
