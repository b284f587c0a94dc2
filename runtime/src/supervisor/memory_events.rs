//! Kills for want of memory, as the kernel counts them for the cgroup of this job: what tells an
//! OOM kill from any other SIGKILL (R17).
//!
//! Called by `recover` at each death.

use std::path::PathBuf;

/// The counter of the job's cgroup; without one, no kill is ever put down to want of memory.
#[derive(Debug)]
pub(crate) struct MemoryEvents {
    file: Option<PathBuf>,
    seen: u64,
}

impl MemoryEvents {
    /// That of this process's cgroup, of either version.
    pub(crate) fn open() -> Self {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::at(candidates(&groups).into_iter().find(|path| count(path).is_some()))
    }

    fn at(file: Option<PathBuf>) -> Self {
        let seen = file.as_ref().and_then(count).unwrap_or(0);
        Self { file, seen }
    }

    /// True when the kernel has killed one more since this last was true. Each kill is one death.
    pub(crate) fn has_moved(&mut self) -> bool {
        let now = self.file.as_ref().and_then(count).unwrap_or(self.seen);
        let has_moved = now > self.seen;
        self.seen += u64::from(has_moved);
        has_moved
    }
}

/// Files that may hold the counter: of version 2, then of version 1; where the path is one of the
/// host's, the mount's root is this container's.
fn candidates(groups: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.events"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.oom_control")
            }
            _ => continue,
        };
        found.push(PathBuf::from(format!("{root}/{}/{file}", path.trim_matches('/'))));
        found.push(PathBuf::from(format!("{root}/{file}")));
    }
    found
}

fn count(path: &PathBuf) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found() {
        let text = "4:memory:/a/b\n3:cpu,cpuacct:/\n0::/c\n";
        let paths = candidates(text);
        let expected = [
            "/sys/fs/cgroup/memory/a/b/memory.oom_control",
            "/sys/fs/cgroup/memory/memory.oom_control",
            "/sys/fs/cgroup/c/memory.events",
            "/sys/fs/cgroup/memory.events",
        ];
        assert_eq!(paths, expected.map(PathBuf::from));
    }

    #[test]
    fn each_kill_is_told_once() {
        let folder = tempfile::tempdir().expect("room for a folder");
        let path = folder.path().join("memory.events");
        let write = |kills| {
            let text = format!("low 0\noom 9\noom_kill {kills}\noom_group_kill 0\n");
            std::fs::write(&path, text).expect("room for a file");
        };
        write(3);
        let mut events = MemoryEvents::at(Some(path.clone()));
        assert!(!events.has_moved(), "kills from before are others'");
        write(5);
        assert!(events.has_moved() && events.has_moved());
        assert!(!events.has_moved());
        assert!(!MemoryEvents::at(None).has_moved());
    }
}
