//! Starts a supervisor: the job's program once more (or the one of an upgrade), with the keeper's
//! arguments, the descriptors that the keeper holds, and its role in the environment.
//!
//! Called by the keeper.

#![expect(unsafe_code, reason = "posix_spawn")]

use super::role::{Role, SUPERVISOR};
use std::ffi::{CString, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

fn c_string(text: OsString) -> CString {
    CString::new(text.into_vec()).unwrap_or_default()
}

/// What a program is started with, in the form that the kernel takes.
struct Words {
    texts: Vec<CString>,
}

impl Words {
    fn pointers(&self) -> Vec<*mut libc::c_char> {
        let all = self.texts.iter().map(|text| text.as_ptr().cast_mut());
        all.chain([std::ptr::null_mut()]).collect()
    }

    /// The keeper's own arguments, under the name of a supervisor.
    fn arguments() -> Self {
        let name = [CString::from(c"testudo-sup")];
        let own = std::env::args_os().skip(1).map(c_string);
        Self { texts: name.into_iter().chain(own).collect() }
    }

    /// The keeper's own environment, and the role.
    fn environment(role: &Role) -> Self {
        let own =
            std::env::vars_os().filter(|(name, _)| name != SUPERVISOR).map(|(name, value)| {
                let mut pair = name;
                pair.push("=");
                pair.push(value);
                c_string(pair)
            });
        let role = c_string(format!("{SUPERVISOR}={role}").into());
        Self { texts: [role].into_iter().chain(own).collect() }
    }
}

/// Starts a supervisor from `binary`, or from this process's own program. It inherits `line`, and
/// what is open here without being closed on exec. Signals of the keeper are held back in it for
/// good: the keeper passes them on.
pub(super) fn supervisor(
    role: &Role,
    line: &OwnedFd,
    binary: Option<&OwnedFd>,
    held_back: &[libc::c_int],
) -> io::Result<i32> {
    let check =
        |code: i32| if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
    let path = match binary {
        Some(binary) => CString::new(format!("/proc/self/fd/{}", binary.as_raw_fd()))?,
        None => CString::from(c"/proc/self/exe"),
    };
    let (arguments, environment) = (Words::arguments(), Words::environment(role));
    let mut actions = MaybeUninit::<libc::posix_spawn_file_actions_t>::uninit();
    let mut attributes = MaybeUninit::<libc::posix_spawnattr_t>::uninit();
    let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
    let mut reset = MaybeUninit::<libc::sigset_t>::uninit();
    let mut pid = 0;
    // SAFETY: all structures are initialised before use, and those that need it destroyed after;
    // the pointer lists end in null and their strings live through the call.
    unsafe {
        check(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        check(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
        let fd = line.as_raw_fd();
        // A descriptor duplicated onto itself loses its close-on-exec flag.
        check(libc::posix_spawn_file_actions_adddup2(actions.as_mut_ptr(), fd, fd))?;
        libc::sigemptyset(mask.as_mut_ptr());
        for signal in held_back {
            libc::sigaddset(mask.as_mut_ptr(), *signal);
        }
        libc::sigemptyset(reset.as_mut_ptr());
        // The Rust runtime ignores SIGPIPE, and ignored signals stay ignored across an exec.
        libc::sigaddset(reset.as_mut_ptr(), libc::SIGPIPE);
        check(libc::posix_spawnattr_setsigmask(attributes.as_mut_ptr(), mask.as_ptr()))?;
        check(libc::posix_spawnattr_setsigdefault(attributes.as_mut_ptr(), reset.as_ptr()))?;
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        check(libc::posix_spawnattr_setflags(attributes.as_mut_ptr(), flags as libc::c_short))?;
        let done = check(libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            actions.as_ptr(),
            attributes.as_ptr(),
            arguments.pointers().as_ptr(),
            environment.pointers().as_ptr(),
        ));
        libc::posix_spawn_file_actions_destroy(actions.as_mut_ptr());
        libc::posix_spawnattr_destroy(attributes.as_mut_ptr());
        done?;
    }
    Ok(pid)
}
