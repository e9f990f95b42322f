//! Compiles the shim between the switch and DPDK, if the feature is on. Otherwise there is nothing to do.

fn main() {
    println!("cargo::rerun-if-changed=src/port/dpdk/shim.c");
    #[cfg(feature = "dpdk")]
    build_shim();
}

#[cfg(feature = "dpdk")]
fn build_shim() {
    // What drivers are made of is loaded at run time; these four are all that the shim calls.
    let libraries = ["rte_ethdev", "rte_mbuf", "rte_mempool", "rte_eal"];
    let query = |what: &str| {
        let output = std::process::Command::new("pkg-config").args([what, "libdpdk >= 22.11"]).output();
        match output {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            _ => {
                println!(
                    "cargo::error=the feature 'dpdk' needs libdpdk 22.11 or later: apt-get install libdpdk-dev pkg-config"
                );
                std::process::exit(1);
            }
        }
    };
    let mut shim = cc::Build::new();
    shim.file("src/port/dpdk/shim.c").warnings(true).extra_warnings(true);
    for flag in query("--cflags").split_whitespace() {
        shim.flag(flag);
    }
    shim.compile("sluice_dpdk");
    query("--libs-only-L").split_whitespace().filter_map(|flag| flag.strip_prefix("-L")).for_each(|folder| {
        println!("cargo::rustc-link-search=native={folder}");
    });
    libraries.iter().for_each(|library| println!("cargo::rustc-link-lib=dylib={library}"));
}
