//! The bare disk, to compare with: as many threads as the job has workers write new files, or read
//! the job's, by the same door to the disk that the engine uses, with nothing else to do.
//!
//! Writing is timed from the first write to the end of the sync. Reading puts the bytes into fresh
//! 4 KiB pages of a memfd: what a restored state is made of.
//!
//! Called by `checkpoint` and `restore`.

use crate::report::Failure;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::state::disk::{
    self, BLOCK, BUFFER_BYTES, Buffer, Disk, DiskKind, Done, FileId, Op, Outcome, Pool,
};
use testudo::time::now_ns;
use testudo_shm::segment::Segment;

/// Staging memory of each thread, as a worker has it.
const STAGING_BYTES: usize = 4 << 20;

/// How long to sleep before looking at the disk again.
const PATIENCE: Duration = Duration::from_millis(10);

/// Bytes a second of `threads` threads that each write a new file of so many bytes in `folder`.
///
/// # Errors
/// What the disk says.
pub fn write(folder: &Path, threads: usize, bytes: u64) -> Result<f64, Failure> {
    let spans = on_threads(threads, |thread| {
        let path = folder.join(format!("raw-{thread}"));
        let span = write_file(&path, bytes);
        let removed = std::fs::remove_file(&path);
        let span = span?;
        removed?;
        Ok(span)
    })?;
    Ok(bytes as f64 * threads as f64 * 1e9 / wall_ns(&spans))
}

/// Bytes a second of one thread for each list of files, reading them whole.
///
/// # Errors
/// What the disk says.
pub fn read(files: &[Vec<PathBuf>]) -> Result<f64, Failure> {
    let bytes = |files: &Vec<PathBuf>| -> std::io::Result<u64> {
        files.iter().map(|file| Ok(std::fs::metadata(file)?.len())).sum()
    };
    let sizes = files.iter().map(bytes).collect::<Result<Vec<_>, _>>()?;
    let spans = on_threads(files.len(), |thread| {
        let memory = Fresh::new(sizes[thread] as usize)?;
        let begun = now_ns();
        let mut to = 0;
        for file in &files[thread] {
            to = read_file(file, &memory, to)?;
        }
        Ok((begun, now_ns()))
    })?;
    Ok(sizes.iter().sum::<u64>() as f64 * 1e9 / wall_ns(&spans))
}

type Span = (u64, u64);

fn wall_ns(spans: &[Span]) -> f64 {
    let begun = spans.iter().map(|span| span.0).min().unwrap_or(0);
    let ended = spans.iter().map(|span| span.1).max().unwrap_or(0);
    ended.saturating_sub(begun).max(1) as f64
}

fn on_threads(
    threads: usize,
    work: impl Fn(usize) -> Result<Span, Failure> + Sync,
) -> Result<Vec<Span>, Failure> {
    std::thread::scope(|scope| {
        let work = &work;
        let started: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let panicked = |_| Err(Failure::Run("a thread of the bare disk panicked".into()));
        started.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}

fn file_of((outcome, _): (Outcome, Option<Buffer>)) -> Result<FileId, Failure> {
    match outcome {
        Outcome::File(file) => Ok(file),
        other => Err(Failure::Run(format!("opening a file gave {other:?}"))),
    }
}

/// Waits for one completion at least.
fn completions(disk: &mut dyn Disk, done: &mut Vec<Done>) {
    disk.poll(done);
    if done.is_empty() {
        disk.wait(PATIENCE);
        disk.poll(done);
    }
}

fn write_file(path: &Path, bytes: u64) -> Result<Span, Failure> {
    let (mut disk, _) = disk::open(DiskKind::Auto)?;
    let pool = Pool::new(STAGING_BYTES);
    let mut all: Vec<Buffer> = std::iter::from_fn(|| pool.take()).collect();
    for (number, buffer) in all.iter_mut().enumerate() {
        buffer.fill(number as u8 + 1);
    }
    drop(all);
    let bytes = bytes.next_multiple_of(BLOCK as u64);
    let file = file_of(disk::run_now(&mut *disk, Op::Create { path: path.into() })?)?;
    disk::run_now(&mut *disk, Op::Reserve { file, bytes })?;
    let begun = now_ns();
    let (mut at, mut done) = (0, Vec::new());
    while at < bytes || disk.in_flight() > 0 {
        while at < bytes
            && let Some(buffer) = pool.take()
        {
            let part = (bytes - at).min(BUFFER_BYTES as u64);
            if disk.submit(Op::Write { file, at, buffer, bytes: part as usize }).is_err() {
                break;
            }
            at += part;
        }
        completions(&mut *disk, &mut done);
        for done in done.drain(..) {
            done.result?;
        }
    }
    disk::run_now(&mut *disk, Op::Sync { file })?;
    let ended = now_ns();
    disk::run_now(&mut *disk, Op::Close { file })?;
    Ok((begun, ended))
}

/// Reads a file to offset `to` of `memory`; gives the offset behind it.
fn read_file(path: &Path, memory: &Fresh, to: usize) -> Result<usize, Failure> {
    let (mut disk, _) = disk::open(DiskKind::Auto)?;
    let pool = Pool::new(STAGING_BYTES);
    let bytes = std::fs::metadata(path)?.len();
    let file = file_of(disk::run_now(&mut *disk, Op::Open { path: path.into() })?)?;
    let (mut at, mut done, mut reading) = (0, Vec::new(), VecDeque::new());
    while at < bytes || disk.in_flight() > 0 {
        while at < bytes
            && let Some(buffer) = pool.take()
        {
            let part = (bytes - at).min(BUFFER_BYTES as u64) as usize;
            match disk.submit(Op::Read { file, at, buffer, bytes: part }) {
                Ok(ticket) => reading.push_back((ticket, at as usize, part)),
                Err(_) => break,
            }
            at += part as u64;
        }
        completions(&mut *disk, &mut done);
        for done in done.drain(..) {
            let place = reading.iter().position(|(ticket, ..)| *ticket == done.ticket);
            let place = place.and_then(|place| reading.remove(place));
            let (Some((_, from, part)), Some(buffer)) = (place, done.buffer) else { continue };
            match done.result? {
                Outcome::Read(read) if read >= part => memory.put(to + from, &buffer[..part])?,
                other => return Err(Failure::Run(format!("{}: {other:?}", path.display()))),
            }
        }
    }
    disk::run_now(&mut *disk, Op::Close { file })?;
    Ok(to + bytes as usize)
}

/// Pages of a memfd that nobody has touched yet.
struct Fresh {
    at: *mut u8,
    bytes: usize,
}

impl Fresh {
    fn new(bytes: usize) -> Result<Self, Failure> {
        let bytes = bytes.next_multiple_of(BLOCK).max(BLOCK);
        let segment = Segment::create("raw", bytes)?;
        let access: c_int = libc::PROT_READ | libc::PROT_WRITE;
        let fd = segment.fd().as_raw_fd();
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self { at: at.cast(), bytes })
    }

    fn put(&self, to: usize, bytes: &[u8]) -> Result<(), Failure> {
        if to + bytes.len() > self.bytes {
            return Err(Failure::Run("a file became longer while it was read".into()));
        }
        // SAFETY: inside the mapping, checked above; only this thread has it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(to), bytes.len()) };
        Ok(())
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped once.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}
