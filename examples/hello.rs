//! A first job: how often each word occurs in some text.
//!
//!     cargo run --release --example hello
//!     cargo run --release --example hello -- --input FILE… --workers 4
//!
//! Words are routed by key, so that one worker counts all occurrences of a word; each prints a line
//! whenever a count changes. `--explain` shows what runs where, `--help` all options that every job
//! has.

use std::path::PathBuf;
use testudo::clap;
use testudo::prelude::*;

// A job's processes allocate seldom once they run; a good allocator still pays wherever text is
// taken apart.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lewis Carroll's poem, for a first run.
const POEM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/data/jabberwocky.txt");

/// Options of the job's own stand beside those that every job has.
#[derive(clap::Args)]
struct Options {
    /// Text files
    #[arg(long, value_name = "FILE", num_args = 1.., default_value = POEM)]
    input: Vec<PathBuf>,
}

/// Describes the job. Every process calls this, and each then runs its part: so it must depend on
/// the options alone.
fn build(flow: &Flow, options: &Options) {
    flow.source("text", FileSource::lines(&options.input))
        .flat_map(|line| {
            let words = line.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
            words.map(str::to_lowercase).collect::<Vec<String>>()
        })
        .key_by(|word| word.to_string())
        .aggregate(|| 0u64, |count, _word| *count += 1, |word, count| (word.to_string(), *count))
        .print(|counted| format!("{:>4} {}", counted.1, counted.0));
}

fn main() -> std::process::ExitCode {
    testudo::main(build)
}
