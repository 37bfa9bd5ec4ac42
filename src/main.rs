//! The `rushlight` command.

fn main() -> std::process::ExitCode {
    rushlight::cli::main()
}
