/**
 * The command line. Results go to stdout, progress and errors to stderr. Exit codes: 0 success, 1 the command failed
 * (`doctor`: something is wrong), 2 the command line cannot be understood.
 */
import { EXIT, UsageError, helpOf, parseOptions, type Command } from './command';
import { demo } from './demo';
import { doctor } from './doctor';
import { estimate } from './estimate';
import { inspect } from './inspect';
import { version } from './version';

const commands: readonly Command[] = [doctor, estimate, inspect, demo];

function overview(): string {
  const width = Math.max(...commands.map(({ name }) => name.length));
  return [
    'innerkv: a low-bit KV cache with fused attention',
    '',
    'usage: innerkv <command> [options]',
    '',
    ...commands.map(({ name, summary }) => `  ${name.padEnd(width)}  ${summary}`),
    '',
    'innerkv <command> --help   options of a command',
    'innerkv --version          version of the package',
    '',
    'exit codes: 0 success, 1 failure, 2 wrong usage',
  ].join('\n');
}

async function main([name, ...args]: readonly string[]): Promise<number> {
  if (name === '--help' || name === '-h') {
    console.log(overview());
    return EXIT.ok;
  }
  if (name === '--version') {
    console.log(version());
    return EXIT.ok;
  }
  const command = commands.find((one) => one.name === name);
  if (!command)
    throw new UsageError(name === undefined ? 'a command is missing' : `there is no command "${name}"`);
  const values = parseOptions(command, args);
  if (values.help) {
    console.log(helpOf(command));
    return EXIT.ok;
  }
  return command.run(values);
}

/** What a person can act on: message and code of our own errors, everything of unexpected ones. */
function report(error: unknown, name: string | undefined): number {
  if (error instanceof UsageError) {
    const known = commands.some((command) => command.name === name) ? ` ${name ?? ''}` : '';
    console.error(`innerkv: ${error.message}. See: innerkv${known} --help`);
    return EXIT.usage;
  }
  if (error instanceof Error && 'code' in error)
    console.error(`innerkv: ${error.message} (${String(error.code)})`);
  else console.error(error);
  return EXIT.failed;
}

// A reader that has seen enough (`innerkv demo | head`) is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
  process.exit(EXIT.ok);
});

const args = process.argv.slice(2);
main(args).then(
  (code) => (process.exitCode = code),
  (error: unknown) => (process.exitCode = report(error, args[0])),
);
