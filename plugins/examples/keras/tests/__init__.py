import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "../../../../fixtures/keras")
sys.path[:0] = [os.path.dirname(HERE), os.path.join(HERE, "../../../python")]
