//! The `testudo` tool: lists running jobs, asks them and tells them things, by name.
//!
//! Everything is in `testudo::tool`; its page says what each exit code means.

use std::process::ExitCode;

fn main() -> ExitCode {
    testudo::tool::main()
}
