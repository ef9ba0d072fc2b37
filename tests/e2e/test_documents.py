"""The documents against the program: options, variables, links, and the languages of README against each other."""

import subprocess
import unittest

import harness


class Documents(unittest.TestCase):
    def test_documents_say_what_the_program_does(self):
        result = subprocess.run([harness.ROOT / "scripts" / "check_docs.py", harness.EXECUTABLE], capture_output=True, text=True,
                                env=harness.clean_environment(), check=False)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)


if __name__ == "__main__":
    unittest.main()
