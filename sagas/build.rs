//! The migrations are read when the crate is compiled; a file that is added there changes no source that cargo knows of.
fn main() {
    println!("cargo::rerun-if-changed=../migrations");
}
