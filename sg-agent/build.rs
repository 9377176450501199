//! Brings the eBPF object to where the agent includes it, `$OUT_DIR/sg-ebpf.o`. Building it is xtask's.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=SG_EBPF_OBJECT");
    let object = object();
    // A file that isn't there counts as changed: the script runs again until it is.
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.is_file() {
        println!("cargo::error=the eBPF object {} is missing: run `cargo xtask build`", object.display());
        return;
    }
    let Some(out) = env::var_os("OUT_DIR") else {
        println!("cargo::error=OUT_DIR isn't set: this is a build script, for cargo to run");
        return;
    };
    let copy = Path::new(&out).join("sg-ebpf.o");
    if let Err(error) = fs::copy(&object, &copy) {
        println!("cargo::error=cannot copy {} to {}: {error}", object.display(), copy.display());
    }
}

/// `SG_EBPF_OBJECT`, or where `cargo xtask build` leaves it.
fn object() -> PathBuf {
    match env::var_os("SG_EBPF_OBJECT") {
        Some(path) => path.into(),
        None => {
            let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
            let package = Path::new(&package);
            package.parent().unwrap_or(package).join("target/bpf/bpfel-unknown-none/release/sg-ebpf")
        }
    }
}
