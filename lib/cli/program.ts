/**
 * Several commands under one name. Results go to stdout, progress and errors to stderr. Exit codes: 0 success, 1 the
 * command failed (`doctor`: something is wrong), 2 the command line cannot be understood.
 */
import { EXIT, UsageError, helpOf, parseOptions, type Command } from './command';
import { version } from './version';

export interface Program {
  /** As typed before a command. */
  readonly name: string;
  readonly summary: string;
  readonly commands: readonly Command[];
}

function overview({ name, summary, commands }: Program): string {
  const width = Math.max(...commands.map((command) => command.name.length));
  return [
    summary,
    '',
    `usage: ${name} <command> [options]`,
    '',
    ...commands.map((command) => `  ${command.name.padEnd(width)}  ${command.summary}`),
    '',
    `${name} <command> --help   options of a command`,
    `${name} --version          version of the package`,
    '',
    'exit codes: 0 success, 1 failure, 2 wrong usage',
  ].join('\n');
}

async function run(program: Program, [name, ...args]: readonly string[]): Promise<number> {
  if (name === '--help' || name === '-h') {
    console.log(overview(program));
    return EXIT.ok;
  }
  if (name === '--version') {
    console.log(version());
    return EXIT.ok;
  }
  const command = program.commands.find((one) => one.name === name);
  if (!command)
    throw new UsageError(name === undefined ? 'a command is missing' : `there is no command "${name}"`);
  const values = parseOptions(command, args);
  if (values.help) {
    console.log(helpOf(command, program.name));
    return EXIT.ok;
  }
  return command.run(values);
}

/** What a person can act on: message and code of our own errors, everything of unexpected ones. */
function report({ name, commands }: Program, error: unknown, given: string | undefined): number {
  if (error instanceof UsageError) {
    const known = commands.some((command) => command.name === given) ? ` ${given ?? ''}` : '';
    console.error(`${name}: ${error.message}. See: ${name}${known} --help`);
    return EXIT.usage;
  }
  if (error instanceof Error && 'code' in error)
    console.error(`${name}: ${error.message} (${String(error.code)})`);
  else console.error(error);
  return EXIT.failed;
}

/** Runs the command that this process was started with. */
export function runProgram(program: Program): void {
  // A reader that has seen enough (`innerkv demo | head`) is no error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
    process.exit(EXIT.ok);
  });

  const args = process.argv.slice(2);
  run(program, args).then(
    (code) => (process.exitCode = code),
    (error: unknown) => (process.exitCode = report(program, error, args[0])),
  );
}
