//! The growth gauge: state grows only into memory that is free, so that a full machine gives an
//! error that names the operator instead of a process killed without a word (rule R12).
//!
//! Free is the least of what the control groups on our path allow (limit − use, file cache that can
//! be dropped counted as free) and of what the kernel calls available. A reserve stays untouched.
//!
//! Invariants: the files are read only when the last budget is used up; a budget is at most a
//! sixteenth of what is free, so that several workers growing at once cannot all count the same
//! bytes; a missing file limits nothing.
//!
//! Called by the heap before a group grows by a chunk.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
/// The least reserve, unless the limit itself is small.
const RESERVE_MIN: u64 = 64 * MIB;
/// Never budget more than this at once: other processes grow too.
const BUDGET_MAX: u64 = 256 * MIB;

/// Where the gauge looks. Tests point it at files of their own.
#[derive(Debug, Clone)]
pub struct GaugePaths {
    /// The process's control groups, normally `/proc/self/cgroup`.
    pub own: PathBuf,
    /// Where control groups are mounted, normally `/sys/fs/cgroup`.
    pub mount: PathBuf,
    /// The kernel's memory figures, normally `/proc/meminfo`.
    pub meminfo: PathBuf,
}

impl Default for GaugePaths {
    fn default() -> Self {
        Self {
            own: "/proc/self/cgroup".into(),
            mount: "/sys/fs/cgroup".into(),
            meminfo: "/proc/meminfo".into(),
        }
    }
}

/// What was found when growth was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes free, reserve included.
    pub free: u64,
    /// Bytes kept in reserve.
    pub reserve: u64,
    /// Bytes that the limit allows in all.
    pub limit: u64,
    /// The file that gave the limit.
    pub limited_by: String,
}

/// The gauge of one process; all its operators share it.
#[derive(Debug)]
pub struct Gauge {
    paths: Option<GaugePaths>,
    reserve: Option<u64>,
    budget: Cell<u64>,
}

impl Default for Gauge {
    fn default() -> Self {
        Self::new(GaugePaths::default(), None)
    }
}

impl Gauge {
    /// A gauge on these files; `reserve` replaces the computed one.
    #[must_use]
    pub fn new(paths: GaugePaths, reserve: Option<u64>) -> Self {
        Self { paths: Some(paths), reserve, budget: Cell::new(0) }
    }

    /// A gauge that refuses nothing, for tests and for tools that only read.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { paths: None, reserve: None, budget: Cell::new(0) }
    }

    /// Takes `wanted` bytes off the budget, reading the files again when it is used up.
    ///
    /// # Errors
    /// What is free, when that is not enough.
    pub fn take(&self, wanted: u64) -> Result<(), Shortage> {
        let Some(paths) = &self.paths else { return Ok(()) };
        if wanted > self.budget.get() {
            let found = look(paths, self.reserve);
            let usable = found.free.saturating_sub(found.reserve);
            if wanted > usable {
                return Err(found);
            }
            // A sixteenth: other workers of the job look at the same figures.
            self.budget.set((usable / 16).min(BUDGET_MAX).max(wanted));
        }
        self.budget.set(self.budget.get() - wanted);
        Ok(())
    }
}

/// The tightest of all limits on our path.
fn look(paths: &GaugePaths, reserve: Option<u64>) -> Shortage {
    let mut found = Shortage {
        free: u64::MAX,
        reserve: 0,
        limit: u64::MAX,
        limited_by: "no limit was found".to_owned(),
    };
    if let Ok(text) = fs::read_to_string(&paths.meminfo)
        && let (Some(total), Some(free)) = (line(&text, "MemTotal:"), line(&text, "MemAvailable:"))
    {
        let limited_by = paths.meminfo.display().to_string();
        found = Shortage { free: free * 1024, limit: total * 1024, limited_by, ..found };
    }
    for own in fs::read_to_string(&paths.own).unwrap_or_default().lines() {
        let mut fields = own.splitn(3, ':');
        let (_, Some(kinds), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let inner = Path::new(path.trim_start_matches('/'));
        if kinds.is_empty() {
            for mount in [paths.mount.clone(), paths.mount.join("unified")] {
                tighten(
                    &mut found,
                    &mount,
                    inner,
                    ["memory.max", "memory.current"],
                    "inactive_file",
                );
            }
        } else if kinds.split(',').any(|kind| kind == "memory") {
            let names = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
            tighten(&mut found, &paths.mount.join("memory"), inner, names, "total_inactive_file");
        }
    }
    let computed = RESERVE_MIN.max(found.limit / 50).min(found.limit / 4);
    found.reserve = reserve.unwrap_or(computed);
    found
}

/// Walks from a control group up to its mount and keeps the smallest free figure.
fn tighten(found: &mut Shortage, mount: &Path, inner: &Path, names: [&str; 2], cache: &str) {
    for folder in inner.ancestors().map(|part| mount.join(part)) {
        let limit_file = folder.join(names[0]);
        let (Some(limit), Some(used)) = (number(&limit_file), number(&folder.join(names[1])))
        else {
            continue;
        };
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let droppable = line(&stat, cache).unwrap_or(0);
        let free = limit.saturating_sub(used.saturating_sub(droppable));
        if free < found.free {
            found.free = free;
            found.limit = limit;
            found.limited_by = limit_file.display().to_string();
        }
    }
}

/// A file that holds one number; `max` and what is no number limit nothing.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind a name in a file of `name number` lines.
fn line(text: &str, name: &str) -> Option<u64> {
    let found = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    found.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// A folder with `/proc` and `/sys` as the test wants them.
    fn fake(test: &str, files: &[(&str, &str)]) -> GaugePaths {
        let root = std::env::temp_dir().join(format!("testudo-{test}-{}", std::process::id()));
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        GaugePaths {
            own: root.join("cgroup"),
            mount: root.join("sys"),
            meminfo: root.join("meminfo"),
        }
    }

    const PLENTY: (&str, &str) =
        ("meminfo", "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n");

    #[test]
    fn the_tightest_ancestor_decides() {
        let paths = fake(
            "ancestor",
            &[
                PLENTY,
                ("cgroup", "0::/outer/inner\n"),
                ("sys/outer/inner/memory.max", "max\n"),
                ("sys/outer/inner/memory.current", "5\n"),
                ("sys/outer/memory.max", "1000000000\n"),
                ("sys/outer/memory.current", "900000000\n"),
            ],
        );
        let found = look(&paths, Some(0));
        assert_eq!((found.free, found.limit), (100_000_000, 1_000_000_000));
        assert!(found.limited_by.ends_with("outer/memory.max"), "{}", found.limited_by);
    }

    #[test]
    fn file_cache_counts_as_free() {
        let paths = fake(
            "cache",
            &[
                PLENTY,
                ("cgroup", "4:memory:/job\n0::/\n"),
                ("sys/memory/job/memory.limit_in_bytes", "1000\n"),
                ("sys/memory/job/memory.usage_in_bytes", "900\n"),
                ("sys/memory/job/memory.stat", "total_cache 700\ntotal_inactive_file 600\n"),
            ],
        );
        assert_eq!(look(&paths, None).free, 700);
    }

    #[test]
    fn the_reserve_is_at_most_a_quarter_of_the_limit() {
        let paths = fake(
            "reserve",
            &[("meminfo", "MemTotal: 1024 kB\nMemAvailable: 1024 kB\n"), ("cgroup", "")],
        );
        assert_eq!(look(&paths, None).reserve, 256 * 1024);
        let gauge = Gauge::new(paths, None);
        assert!(gauge.take(768 * 1024).is_ok());
        assert!(gauge.take(769 * 1024).is_err());
    }

    #[test]
    fn files_are_read_only_when_the_budget_is_used_up() {
        let paths = fake("budget", &[PLENTY, ("cgroup", "")]);
        let gauge = Gauge::new(paths.clone(), None);
        gauge.take(4096).unwrap();
        fs::write(&paths.meminfo, "MemTotal: 8 kB\nMemAvailable: 0 kB\n").unwrap();
        gauge.take(64 * MIB).unwrap();
        assert!(gauge.take(BUDGET_MAX).is_err());
    }

    #[test]
    fn missing_files_limit_nothing() {
        let gauge = Gauge::new(fake("missing", &[]), None);
        assert!(gauge.take(1 << 40).is_ok());
    }
}
