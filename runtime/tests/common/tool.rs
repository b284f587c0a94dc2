//! The `testudo` tool as a program.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs the tool, which looks for jobs in this place alone.
pub fn tool(at: &Path, words: &[&str]) -> Output {
    tool_command(at, words).output().expect("the tool runs")
}

pub fn tool_command(at: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_testudo"));
    command.args(words).env("XDG_RUNTIME_DIR", at).env("TMPDIR", at).stdin(Stdio::null());
    command
}

/// What the tool said: its exit code, its output and its complaints.
pub fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code().expect("no signal"), text(&output.stdout), text(&output.stderr))
}
