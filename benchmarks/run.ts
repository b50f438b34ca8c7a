/** `npm run bench -- <name>`: each benchmark is a command of its own file. */
import { runProgram } from '../lib/cli/program';
import { cpu } from './cpu';
import { cuda } from './cuda';
import { model } from './model';

runProgram({ name: 'bench', summary: 'benchmarks of innerkv', commands: [cpu, cuda, model] });
