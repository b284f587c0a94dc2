//! The files that a disk of the kernel has open.
//!
//! Invariants: an id is an index and a generation, so that an id kept after its close is found out;
//! a file is neither synced nor closed while transfers of it are in flight.
//!
//! Called by the disks that use the kernel's files.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use super::FileId;

#[derive(Debug)]
struct File {
    fd: OwnedFd,
    path: Arc<Path>,
    /// Transfers in flight.
    transfers: u32,
    /// Syncs in flight.
    syncs: u32,
}

#[derive(Debug, Default)]
struct Place {
    generation: u32,
    file: Option<File>,
}

/// Open files by their ids.
#[derive(Debug, Default)]
pub(super) struct Files {
    places: Vec<Place>,
}

impl Files {
    pub(super) fn add(&mut self, fd: OwnedFd, path: Arc<Path>) -> FileId {
        let free = self.places.iter().position(|place| place.file.is_none());
        let index = free.unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = &mut self.places[index];
        place.file = Some(File { fd, path, transfers: 0, syncs: 0 });
        FileId(u64::from(place.generation) << 32 | index as u64)
    }

    fn place(&mut self, id: FileId) -> &mut Place {
        let generation = (id.0 >> 32) as u32;
        let place = self.places.get_mut(id.0 as u32 as usize);
        let place = place.filter(|place| place.generation == generation && place.file.is_some());
        place.unwrap_or_else(|| panic!("{id:?} is not open on this disk"))
    }

    fn file(&mut self, id: FileId) -> &mut File {
        self.place(id).file.as_mut().expect("found with a file")
    }

    /// For a transfer, which [`Files::transferred`] ends.
    pub(super) fn transfer(&mut self, id: FileId) -> (RawFd, Arc<Path>) {
        let file = self.file(id);
        file.transfers += 1;
        (file.fd.as_raw_fd(), Arc::clone(&file.path))
    }

    pub(super) fn transferred(&mut self, id: FileId) {
        self.file(id).transfers -= 1;
    }

    /// For a sync, which [`Files::synced`] ends.
    pub(super) fn sync(&mut self, id: FileId) -> (RawFd, Arc<Path>) {
        let file = self.file(id);
        let (path, busy) = (file.path.display(), file.transfers);
        assert_eq!(busy, 0, "sync of {path} with transfers in flight, which it would not cover");
        file.syncs += 1;
        (file.fd.as_raw_fd(), Arc::clone(&file.path))
    }

    pub(super) fn synced(&mut self, id: FileId) {
        self.file(id).syncs -= 1;
    }

    /// For a close: the id is not valid any more.
    pub(super) fn take(&mut self, id: FileId) -> (OwnedFd, Arc<Path>) {
        let file = self.file(id);
        let busy = file.transfers + file.syncs;
        assert_eq!(busy, 0, "close of {} with operations in flight", file.path.display());
        let place = self.place(id);
        let file = place.file.take().expect("found with a file");
        place.generation = place.generation.wrapping_add(1);
        (file.fd, file.path)
    }
}
