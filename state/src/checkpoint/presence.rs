//! Whether a checkpoint folder is still the one that was opened.
//!
//! A folder may be removed while a job runs, or another one be mounted in its place. What a process
//! has open then still works, and leads nowhere: a root written there is found by nobody. So the
//! folder and its roots are known by their inodes, and looked at again before a checkpoint counts.
//!
//! Called by `store`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a folder and its roots are to the kernel; nothing of it where they are in no file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Presence {
    folder: Option<(u64, u64)>,
    roots: Option<(u64, u64)>,
}

impl Presence {
    /// What is there now.
    pub(crate) fn of(folder: &Path, roots: &str) -> Self {
        let identity = |path: &Path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.dev(), meta.ino()))
        };
        Self { folder: identity(folder), roots: identity(&folder.join(roots)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_was_made_again_is_another_one() {
        let outer = tempfile::tempdir().expect("room for a folder");
        let folder = outer.path().join("ck");
        let make = || {
            std::fs::create_dir(&folder).expect("room for a folder");
            std::fs::write(folder.join("roots"), "x").expect("room for a file");
        };
        make();
        let before = Presence::of(&folder, "roots");
        assert_eq!(before, Presence::of(&folder, "roots"));
        std::fs::rename(&folder, outer.path().join("old")).expect("our own folder");
        assert_ne!(before, Presence::of(&folder, "roots"));
        make();
        assert_ne!(before, Presence::of(&folder, "roots"));
    }
}
