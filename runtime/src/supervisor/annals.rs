//! The annals: a job's deaths and what was done about them, for as long as the job runs.
//!
//! Invariants: bounded, with the first ones kept (they say how it began) and the latest; names of
//! functions are looked up when somebody asks, in a thread of their own, since reading a large
//! program's symbols takes longer than a recovery.
//!
//! Called by `recover`, `dead_letters` and `hang`; shown by `orders`.

use super::report::Restart;
use crate::control::history::{Event, PostMortem};
use crate::time::unix_ms;
use crate::worker::dying::executable;

/// Entries kept from the begin, and as many of the latest.
const KEPT: usize = 64;

/// Lines of a backtrace.
const LINES: usize = 64;

/// A post-mortem with what its backtrace is made of.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) post_mortem: PostMortem,
    /// Where the executable lay in the dead process, and its stack.
    pub(crate) base: u64,
    pub(crate) frames: Vec<u64>,
    /// The restart that it belongs to.
    pub(crate) restart: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Annals {
    entries: Vec<Entry>,
    events: Vec<Event>,
}

/// Makes room for one more: the oldest of the latest goes.
fn bound<T>(list: &mut Vec<T>) {
    if list.len() >= 2 * KEPT {
        list.remove(KEPT);
    }
}

impl Annals {
    /// Goes on with what is known of deaths that an earlier supervisor saw.
    pub(crate) fn go_on(&mut self, restarts: &[Restart]) {
        for (number, restart) in restarts.iter().enumerate() {
            let post_mortem = PostMortem {
                worker: restart.worker,
                life: restart.life,
                pid: restart.pid.cast_signed(),
                cause: if restart.why.is_empty() { &restart.cause } else { &restart.why }.clone(),
                own_doing: !restart.why.is_empty(),
                exit: restart.cause.clone(),
                message: restart.last_words.clone(),
                operator: restart.operator.clone(),
                record: restart.record.clone(),
                rung: restart.rung.clone(),
                ..PostMortem::default()
            };
            self.add(Entry { post_mortem, base: 0, frames: Vec::new(), restart: number });
        }
    }

    pub(crate) fn add(&mut self, entry: Entry) {
        bound(&mut self.entries);
        self.entries.push(entry);
    }

    pub(crate) fn note(&mut self, kind: &str, worker: usize, cause: impl Into<String>) {
        bound(&mut self.events);
        let (kind, cause) = (kind.to_owned(), cause.into());
        self.events.push(Event { unix_ms: unix_ms(), kind, worker, cause });
    }

    pub(crate) fn events(&self) -> &[Event] {
        &self.events
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The latest death of a worker.
    pub(crate) fn latest(&self, worker: usize) -> Option<&PostMortem> {
        let all = self.entries.iter().rev().map(|entry| &entry.post_mortem);
        all.into_iter().find(|post_mortem| post_mortem.worker == worker)
    }

    /// The kernel has said how the process of a restart ended.
    pub(crate) fn ended(&mut self, restart: usize, exit: &str) {
        let entry = self.entries.iter_mut().rev().find(|entry| entry.restart == restart);
        if let Some(Entry { post_mortem, .. }) = entry {
            exit.clone_into(&mut post_mortem.exit);
            if post_mortem.cause.is_empty() {
                exit.clone_into(&mut post_mortem.cause);
            }
        }
    }
}

/// The post-mortems with their backtraces. Takes its time.
pub(crate) fn with_backtraces(entries: Vec<Entry>) -> Vec<PostMortem> {
    let entries = entries.into_iter();
    let full = entries.map(|Entry { mut post_mortem, base, frames, .. }| {
        if !frames.is_empty() {
            post_mortem.backtrace = backtrace_of(base, &frames);
        }
        post_mortem
    });
    full.collect()
}

/// The names of a dead process's frames: it ran the same executable as this one.
fn backtrace_of(base: u64, frames: &[u64]) -> Vec<String> {
    let own = executable();
    let mut lines = Vec::new();
    for (depth, frame) in frames.iter().enumerate() {
        let offset = frame.wrapping_sub(base);
        if offset >= own.end - own.start {
            lines.push(format!("{frame:#x} in a library"));
            continue;
        }
        // A return address stands behind the call.
        let address = own.start + offset - u64::from(depth > 0);
        let before = lines.len();
        backtrace::resolve(std::ptr::without_provenance_mut(address as usize), |symbol| {
            let name = symbol.name().map_or("?".into(), |name| format!("{name:#}"));
            let place = symbol.filename().zip(symbol.lineno());
            let place = place
                .map_or(String::new(), |(file, line)| format!(" at {}:{line}", file.display()));
            lines.push(format!("{name}{place}"));
        });
        if lines.len() == before {
            lines.push(format!("executable + {offset:#x}"));
        }
    }
    lines.truncate(LINES);
    lines
}
