//! Random bits in what a worker leaves: whichever flips in a part that verification covers, the
//! result is exact and the job ends well.

use super::common::process::Held;
use super::common::{Random, soak, wait_for};
use super::scribble::Memory;
use super::{Life, worker_of};
use std::time::Duration;

/// What verification covers, one after the other.
const PARTS: [&str; 6] = ["header", "published", "directory", "log", "group", "table"];

/// Where a bit flipped: the part, the byte in it, the bit.
type Flip = (&'static str, u64, u32);

/// A job one of whose workers is stopped somewhere, changed in one bit, and killed.
fn flipped(part: &'static str, random: &mut Random) -> (Flip, Result<(), String>) {
    let life = Life::new(20_000);
    let mut job = life.with_checkpoints("sums", "none", 0, 120_000).start();
    wait_for("a checkpoint", || {
        assert!(job.child.try_wait().expect("our own child").is_none(), "the job is too short");
        super::has_checkpoint(life.folder.path()).then_some(())
    });
    std::thread::sleep(Duration::from_micros(random.below(60_000)));
    let worker = worker_of(&job, "testudo-w1");
    let held = Held::child_of(worker, job.pid()).expect("a worker");
    held.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(2));
    let (at, bit) = Memory::of(worker).flip(part, "sums", random);
    held.signal(libc::SIGKILL);
    let ended = job.wait();
    let flip = (part, at, bit);
    if ended.code != Some(0) {
        return (flip, Err(format!("{:?}: {}", ended.code, ended.err)));
    }
    let rows = super::sorted_lines(&life.path("rows"));
    if rows != super::sums_rows(life.total) {
        return (flip, Err(format!("the rows are wrong: {}", ended.err)));
    }
    let went_back = ended.err.contains("went back to");
    println!("{part} byte {at} bit {bit}: {}", if went_back { "went back" } else { "went on" });
    (flip, Ok(()))
}

/// A flipped bit is harmless or found, wherever it is in what is verified.
pub fn a_flipped_bit_is_harmless_or_found() {
    let seed = std::env::var("TESTUDO_SOAK_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = Random::new(seed.unwrap_or(1));
    let only = std::env::var("TESTUDO_SOAK_PART").ok();
    let parts = PARTS.iter().filter(|part| only.as_deref().is_none_or(|only| only == **part));
    let mut wrong = Vec::new();
    for part in parts {
        for _ in 0..soak(50, 1) {
            let (flip, result) = flipped(part, &mut random);
            wrong.extend(result.err().map(|why| format!("{flip:?}: {why}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
