/** Programs in documents: the fenced ts blocks of a page, in order, with what its `<!-- example setup` comments add. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import ts from 'typescript';

const root = join(__dirname, '..', '..');

/** One module whose default export runs the page. */
export function programOf(page: string): string {
  const text = readFileSync(join(root, page), 'utf8');
  const parts = [...text.matchAll(/^(?:```ts\n(.*?)^```|<!-- example setup\n(.*?)^-->)/gms)].map(
    ([, code, setup]) => code ?? setup!,
  );
  const imports = parts.flatMap((part) => part.match(/^import .*?;$/gms) ?? []);
  const body = parts.map((part) => part.replace(/^import .*?;$/gms, '')).join('\n');
  return `${imports.join('\n')}\nexport default async function main(console: { log(...all: unknown[]): void }) {\n${body}\n}\n`;
}

/** What the compiler objects to, under the rules of the project; `innerkv` is lib/. */
export function typeErrors(programs: ReadonlyMap<string, string>): string[] {
  const { config } = ts.readConfigFile(join(root, 'tsconfig.json'), (path) => readFileSync(path, 'utf8')) as {
    config: { compilerOptions: object };
  };
  const { options } = ts.convertCompilerOptionsFromJson(
    { ...config.compilerOptions, paths: { innerkv: ['./lib/index.ts'] }, noUnusedLocals: false },
    root,
  );
  const plain = ts.createCompilerHost(options);
  const files = new Map([...programs].map(([page, text]) => [join(root, `${page}.example.ts`), text]));
  const host: ts.CompilerHost = {
    ...plain,
    fileExists: (path) => files.has(path) || plain.fileExists(path),
    readFile: (path) => files.get(path) ?? plain.readFile(path),
    getSourceFile: (path, language, ...rest) =>
      files.has(path)
        ? ts.createSourceFile(path, files.get(path)!, language)
        : plain.getSourceFile(path, language, ...rest),
  };
  const program = ts.createProgram([...files.keys()], options, host);
  return ts.getPreEmitDiagnostics(program).map(({ file, start, messageText }) => {
    const line = file && start !== undefined ? file.getLineAndCharacterOfPosition(start).line + 1 : 0;
    return `${file?.fileName ?? ''}:${line}: ${ts.flattenDiagnosticMessageText(messageText, '\n')}`;
  });
}

/** Runs a program with `innerkv`; answers what it printed. */
export async function runProgram(text: string, innerkv: object): Promise<string[]> {
  const { outputText } = ts.transpileModule(text, {
    compilerOptions: { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2022 },
  });
  const printed: string[] = [];
  const exports: { default?: (console: object) => Promise<void> } = {};
  const load = (name: string): unknown => {
    if (name === 'innerkv') return innerkv;
    throw new Error(`an example must not import ${name}`);
  };
  // eslint-disable-next-line @typescript-eslint/no-implied-eval -- the text is a page of this repository
  const evaluate = new Function('require', 'exports', outputText) as (...all: unknown[]) => void;
  evaluate(load, exports);
  await exports.default!({ log: (...all: unknown[]) => printed.push(all.join(' ')) });
  return printed;
}
